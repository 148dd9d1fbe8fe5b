"""One worker of stage one: decode -> encode -> shard, for the shards it is given."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from configs.schema import Config, ConfigError
from extract.datasets import Clip
from extract.decode import DecodePool, PreparedClip, UndecodedClip, prepare_clip
from extract.encoders import Checkpoint, VideoEncoder, find_network, load_video_encoder
from features import Failure, PatchTokens, ShardOwned, ShardWork, Store


class TooManyErrors(RuntimeError):
    """More clips are in quarantine than `engine.max_errors` allows; what was committed stays."""


@dataclass(frozen=True)
class Tally:
    """What a worker did: clips committed and quarantined, and shards left to another owner (one line each)."""

    committed: int = 0
    quarantined: int = 0
    skipped: tuple[str, ...] = ()

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.committed + other.committed, self.quarantined + other.quarantined, self.skipped + other.skipped
        )


def load_encoder(config: Config, checkpoint: Checkpoint, device: str | None = None) -> VideoEncoder:
    """The frozen video encoder in evaluation mode, on `device` or else on `encoder.device`.

    Raises:
        CheckpointError: not a checkpoint of `encoder.arch`, or `video.size` is not what it was trained on.
        ConfigError: the device is not there, or `encoder.compile` has no compiler.
    """
    encoder = load_video_encoder(
        config.encoder.arch,
        checkpoint,
        num_frames=config.video.frames,
        depth=config.encoder.depth,
        path=config.encoder.path,
        size=config.video.size,
        compile=config.encoder.compile,
        dtype=getattr(torch, config.encoder.dtype),
    )
    return encoder.to(device_of(device or config.encoder.device)).eval()


def open_decoders(config: Config, workers: int) -> DecodePool:
    """Decoder children that show of a frame what the configured network was trained to see."""
    prepare = functools.partial(prepare_clip, transform=find_network(config.encoder.arch).transform)
    return DecodePool(config.video, workers, prepare)


def device_of(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else CPU.

    Raises:
        ConfigError: a CUDA device was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"encoder.device is {name!r}; torch sees no CUDA device here: use auto or cpu")
    return torch.device(name)


def encode_shards(
    config: Config,
    encoder: VideoEncoder,
    store: Store,
    works: Sequence[ShardWork],
    clips: Mapping[str, Clip],
    decoders: int,
    on_progress: Callable[[int, int], None],
) -> Tally:
    """Encode `works` into `store`.

    Args:
        config: the experiment.
        encoder: on its device, in evaluation mode.
        store: open for writing.
        works: shards with the ids that they still miss.
        clips: clip of each id.
        decoders: decoder children.
        on_progress: called with (clips, bytes) as they are encoded.

    Raises:
        TooManyErrors: checked after each shard is committed.
    """
    tally = Tally()
    with open_decoders(config, decoders) as pool:
        for work in works:
            try:
                with store.lease(work.shard) as uncommitted:
                    # Another job may have written some of them since the work was listed.
                    todo = [clips[clip_id] for clip_id in work.ids if clip_id in uncommitted]
                    tally += _encode_shard(config, encoder, store, work.shard, todo, pool, on_progress)
            except ShardOwned as owned:
                tally += Tally(skipped=(str(owned),))
            _check_errors(config, store)
    return tally


def _encode_shard(
    config: Config,
    encoder: VideoEncoder,
    store: Store,
    shard: int,
    clips: Sequence[Clip],
    pool: DecodePool,
    on_progress: Callable[[int, int], None],
) -> Tally:
    rows: dict[str, dict[str, torch.Tensor]] = {}
    sources: dict[str, str] = {}
    failures: dict[str, Failure] = {}
    prepared = pool.map(clips)
    while results := list(islice(prepared, config.encoder.batch)):
        decoded: list[PreparedClip] = []
        for result in results:
            if isinstance(result, UndecodedClip):
                failures[result.clip.clip_id] = Failure(result.reason, result.traceback)
            else:
                decoded.append(result)
        encoded = _encode(config, encoder, decoded)
        rows |= encoded
        sources |= {one.clip.clip_id: one.source for one in decoded}
        on_progress(len(results), sum(t.nbytes for row in encoded.values() for t in row.values()))
    store.write_shard(shard, rows, sources, failures)
    return Tally(len(rows), len(failures))


def _encode(
    config: Config, encoder: VideoEncoder, decoded: Sequence[PreparedClip]
) -> dict[str, dict[str, torch.Tensor]]:
    """Rows of the store, by clip id."""
    if not decoded:
        return {}
    device = next(encoder.parameters()).device
    frames_btchw = torch.stack([torch.from_numpy(one.frames) for one in decoded]).to(device)
    with torch.inference_mode():
        tokens: PatchTokens = encoder(frames_btchw)
    stored = getattr(torch, config.store.dtype)
    names = {"patches": stored, "coarse": stored, "cls": torch.float32}
    tensors = {name: t.to(names.get(name, torch.float32)).cpu() for name, t in tokens.tensors().items()}
    tensors["timestamps"] = torch.stack([torch.from_numpy(one.timestamps) for one in decoded])
    return {one.clip.clip_id: {name: t[i] for name, t in tensors.items()} for i, one in enumerate(decoded)}


def _check_errors(config: Config, store: Store) -> None:
    limit = config.engine.max_errors
    allowed = limit * len(store.planned_ids) if isinstance(limit, float) and limit < 1 else limit
    bad = store.quarantine
    if len(bad) > allowed:
        clip_id, record = next(iter(bad.items()))
        raise TooManyErrors(
            f"clips in quarantine: {len(bad)}, engine.max_errors allows {limit:g}; the first is {clip_id}:"
            f" {record.reason}"
        )
