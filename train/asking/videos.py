"""Encodes a video that is asked about: once, into the user's cache, with the settings of the head's own store."""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Clip, load_dataset
from egopatch.extract.datasets.folder import find_videos
from egopatch.features import Fingerprint, FingerprintMismatch, StoreError, open_store
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.lease import writable
from egopatch.train.rundir.run_folder import RunError

FINISHED = "finished.json"  # written once every clip is encoded or quarantined


@dataclass(frozen=True)
class EncodedVideo:
    """The clips of one video or folder of videos.

    Attributes:
        config: Experiment of their store.
        folder: Folder in the cache that holds the store.
        clips: Clips in the store, by id.
        quarantined: Clips that could not be encoded: reason by id.
        encoded: Number of clips that this call encoded.
    """

    config: Config
    folder: Path
    clips: Mapping[str, Clip]
    quarantined: Mapping[str, str]
    encoded: int


def encode_video(video: Path, experiment: Config, card: Card, clip_s: float | None, cache: Path) -> EncodedVideo:
    """Encode a video, or a folder of videos, for the head of `card`, unless `cache` holds its features.

    Progress goes to standard error.

    Args:
        video: The file or folder.
        experiment: Config that the head was trained with.
        clip_s: Length of the clips in seconds; None makes each video one clip.
        cache: Folder of all cached features.

    Raises:
        DatasetError: There is no video.
        StoreError: None of its clips can be decoded; the message gives the first reason.
        CheckpointError, ConfigError: As `extract.run.extract_features`; also if `cache` cannot be written.
        FingerprintMismatch: The encoder gives other features than those that the head was trained on.
        RunError: The head reads no video, or its features cannot be encoded here: they were imported or derived.
    """
    # Imported here, because the rest of stage two works without a video library.
    from egopatch.extract.planning.own_videos import config_beside, prepare_own_videos
    from egopatch.extract.run import extract_features
    from egopatch.extract.worker.job import resolve_job

    if card.fingerprint is None:
        raise RunError(
            f"run.dir is {experiment.run.dir}, whose {card.model} head reads no video; expected one that does"
        )
    if card.fingerprint.get("origin") == "imported":
        raise RunError(
            f"run.dir is {experiment.run.dir}, whose head was trained on imported features, so no network here"
            " can encode a video for it; import the video's features, and ask with --config and --clip"
        )
    if "derived_keep" in card.fingerprint:
        raise RunError(
            f"run.dir is {experiment.run.dir}, whose head was trained on a derived store, which has only some patches"
            " of each frame; use a head that was trained on a full store, or ask with --config and --clip"
        )
    folder = cache.absolute() / cache_key(video, card.fingerprint, clip_s)
    config = dataclasses.replace(config_beside(folder / "store", experiment), run=experiment.run)
    encoded = 0
    if not (folder / FINISHED).exists():
        with writable("cache", cache):
            cache.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(sys.stderr):
            job = resolve_job(config)
            _require_same_features(experiment.run.dir, card.fingerprint, job.fingerprint)
            with writable("cache", cache):
                folder.mkdir(exist_ok=True)
            prepare_own_videos(video, folder / "store", experiment, clip_s)
            encoded = extract_features(job).stats.committed
    clips = {clip.clip_id: clip for clip in load_dataset(config.data).clips}
    with open_store(config.store.path) as store:
        quarantined = {name: record.reason for name, record in store.quarantine.items()}
        stored = {name: clips[name] for name in store.clip_ids}
    if not stored:
        raise StoreError(f"--video is {video}, but none of it can be decoded: {next(iter(quarantined.values()))}")
    (folder / FINISHED).write_text(json.dumps({"video": str(video.absolute())}) + "\n")
    return EncodedVideo(config, folder, stored, quarantined, encoded)


def _require_same_features(run: Path, trained_on: Mapping[str, Any], now: Fingerprint) -> None:
    """Refuse to encode with an updated package or checkpoint: the cache would keep features that the head refuses."""
    if different := Fingerprint(trained_on).differences(now, "head has", "here"):
        raise FingerprintMismatch(
            f"the head in {run} was trained on features that differ from those that the encoder gives here "
            f"({'; '.join(different)}); restore the package or checkpoint that the head was trained with, or encode "
            "its store again and train it anew"
        )


def cache_key(video: Path, fingerprint: Mapping[str, object], clip_s: float | None) -> str:
    """A name for the features of exactly these files, with this clip length and these settings."""
    found = find_videos(video).values()
    # A link to a missing file has no size; its clip is quarantined.
    states = [(path, path.stat() if path.exists() else None) for path in found]
    files = [(str(path.resolve()), state and (state.st_size, state.st_mtime_ns)) for path, state in states]
    made_of = json.dumps([files, dict(fingerprint), clip_s], sort_keys=True)
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]
