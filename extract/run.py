"""Stage one: encodes every clip and every question of a data set once, and stores the results."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets import Clip, Dataset, load_dataset
from egopatch.extract.datasets.origins import OriginCheck, compare_origins
from egopatch.extract.encoders import find_network
from egopatch.extract.encoders.networks import imported
from egopatch.extract.engines.dispatch import encode_with_engine
from egopatch.extract.engines.job_slice import ALL_SHARDS, Slice
from egopatch.extract.engines.sharing import still_missing, worker_count
from egopatch.extract.feed.pool import decoder_count
from egopatch.extract.planning.plan import disk_refusal
from egopatch.extract.texts import TextNetwork, create_text_store, cut_texts, encode_texts, find_text_network
from egopatch.extract.worker.device import device_of, shortage_explained
from egopatch.extract.worker.job import ExtractionJob, resolve_job
from egopatch.extract.worker.job_stats import JobStats, record_job
from egopatch.extract.worker.pipeline import Target, fill_stores
from egopatch.features import ShardOwned, ShardWork, Store, StoreError, create_store, open_store
from egopatch.features.common.machine import limit_threads
from egopatch.features.common.os_errors import NOT_ALLOWED
from egopatch.features.common.progress import ProgressDisplay
from egopatch.features.common.units import counted
from egopatch.features.state.counts import read_ledger
from egopatch.features.values.location import parse_location

WAIT_POLL_S = 1.0
WAIT_ANNOUNCE_S = 600.0


@dataclass(frozen=True)
class ExtractionResult:
    """State of the store after a job.

    A job without questions leaves the fields about texts at their defaults, one of questions alone those about clips.

    Attributes:
        stats: Statistics of this job.
        clips: Number of clips of the data set that are committed in the store.
        planned: Number of clips of the data set.
        texts: Number of question texts in the store.
        texts_planned: Number of question texts that have a row in the store.
        texts_left: Number of texts of this job in shards that other processes hold.
        others: Number of clips committed in the store that the data set does not have.
        quarantine: Id -> reason, for the data set's clips in quarantine.
        reconstruction_error: Quantised array -> error of the worst clip, as `Store.reconstruction_error`.
        check: The stored clips of this job's shards, compared with the annotations. Clips that are still stale are
            held by another job, or were encoded by a job with other annotations.
        machines: As `Store.machines`.
        clips_left: As `texts_left`, of clips.
    """

    stats: JobStats
    clips: int
    planned: int
    texts: int = 0
    texts_planned: int = 0
    texts_left: int = 0
    others: int = 0
    quarantine: dict[str, str] = field(default_factory=dict)
    reconstruction_error: dict[str, float] = field(default_factory=dict)
    check: OriginCheck = field(default_factory=lambda: OriginCheck({}, 0))
    machines: dict[str, int] = field(default_factory=dict)
    clips_left: int = 0


def extract_features(job: ExtractionJob) -> ExtractionResult:
    """As `extract_together`, for one config that is resolved already; waits for shards that other processes hold."""
    limit_threads()
    _require_one_gpu(job.config)
    return _extract([job], retry=False, job_slice=ALL_SHARDS, refresh=False, wait=True)[0]


def extract_together(
    configs: Sequence[Config],
    retry: bool = False,
    job_slice: Slice = ALL_SHARDS,
    refresh: bool = False,
    wait: bool = False,
) -> list[ExtractionResult]:
    """Encode everything that is missing from the store of each config, with one decode of each clip for all of them.

    Args:
        configs: The experiments; several must have the same data, frames and engine, with one worker.
        retry: Whether to try the quarantined clips again.
        job_slice: The shards of this job, where several jobs divide them.
        refresh: Whether to encode stale clips again; without it, a store with stale clips is refused.
        wait: Whether to wait for the shards that other processes hold, and to encode what those processes leave.

    Raises:
        DatasetError, CheckpointError, StoreError: The input is wrong or the disk is full; no clip was written.
        ConfigError: The configs cannot share a decode, or several workers would share one GPU's decoder.
        TooManyErrors: More clips failed than `engine.max_errors`; committed shards stay.
        WorkersKilled: Workers were killed after every restart; committed shards stay.
        JobFailed: A GPU has too little memory for `encoder.batch` clips, or for the network of the questions.
    """
    limit_threads()
    require_one_decode(configs)
    _require_one_gpu(configs[0])
    if configs[0].encoder.arch == imported.NETWORK.name:
        return [_encode_questions_of_imported(configs[0], job_slice, wait)]
    return _extract([resolve_job(config) for config in configs], retry, job_slice, refresh, wait)


def _extract(
    jobs: Sequence[ExtractionJob], retry: bool, job_slice: Slice, refresh: bool, wait: bool
) -> list[ExtractionResult]:
    for job in jobs:
        if job.frames_line is not None:
            print(f"note: {job.frames_line}", flush=True)
    dataset = load_dataset(jobs[0].config.data)
    clips = {clip.clip_id: clip for clip in dataset.clips}
    stores = [_open(job, dataset, retry, job_slice, refresh) for job in jobs]
    for opened in stores:
        if opened.texts is not None:
            opened.texts.encode(wait)
    together = len(stores) > 1
    if together:
        _encode_together(stores, clips)
    for opened in stores:
        works = _left_by_others(opened.store, opened.works, wait, "clip") if together else opened.works
        while works:
            display = ProgressDisplay("encode", _count(works), "clips")
            with shortage_explained(opened.job.config.encoder), display:
                opened.stats += encode_with_engine(opened.job, opened.store, works, clips, display.advance)
            works = _left_by_others(opened.store, works, wait, "clip")
    return [opened.finish(dataset, job_slice) for opened in stores]


def _encode_together(stores: "Sequence[_OpenedStore]", clips: Mapping[str, Clip]) -> None:
    """Encode what is missing from several stores, with one decode of each clip."""
    incomplete = [opened for opened in stores if opened.works]
    if not incomplete:
        return
    config = stores[0].job.config
    targets = [Target(opened.job, opened.store, opened.works) for opened in incomplete]
    display = ProgressDisplay("encode", sum(_count(opened.works) for opened in incomplete), "clips")
    largest = max((opened.job.config.encoder for opened in incomplete), key=lambda encoder: encoder.batch)
    with shortage_explained(largest), display:
        filled = fill_stores(targets, clips, decoder_count(config, 1), display.advance)
    for opened, stats in zip(incomplete, filled, strict=True):
        opened.stats = stats


def _require_one_gpu(config: Config) -> None:
    if config.video.decoder == "nvdec" and worker_count(config) > 1:
        raise ConfigError(
            f"video.decoder is nvdec with {worker_count(config)} workers, which would all decode on the first GPU; "
            "start one job per GPU, each with engine.workers 1, --shard i/N and CUDA_VISIBLE_DEVICES"
        )


def require_one_decode(configs: Sequence[Config]) -> None:
    """Check that one decode of each clip serves all `configs`.

    Raises:
        ConfigError: The configs cannot share a decode.
    """
    first = configs[0]
    for other in configs[1:]:
        for section in ("data", "video", "engine"):
            theirs = dataclasses.asdict(getattr(other, section))
            for name, value in dataclasses.asdict(getattr(first, section)).items():
                if value != theirs[name] and (section, name) != ("video", "size"):
                    raise ConfigError(
                        f"{section}.{name} is {value!r} for store {first.store.path} and {theirs[name]!r} for "
                        f"{other.store.path}; configs that share a decode may differ in video.size, but in no other "
                        "option of data, video and engine: run them one after the other"
                    )
    if len(configs) > 1 and imported.NETWORK.name in (config.encoder.arch for config in configs):
        raise ConfigError(
            f"encoder.arch is {imported.NETWORK.name} in one config, but an imported store needs no decode to share; "
            "run that config alone"
        )
    locations = [parse_location(config.store.path) for config in configs]
    # A folder has many spellings.
    paths = [str(place.resolve() if isinstance(place, Path) else place) for place in locations]
    if twice := {path for path in paths if paths.count(path) > 1}:
        raise ConfigError(f"store.path is {twice.pop()} in two configs; each needs a store of its own")
    if len(configs) > 1 and (first.engine.name != "joblib" or worker_count(first) != 1):
        raise ConfigError(
            f"engine.name is {first.engine.name} with {worker_count(first)} workers; configs that share a decode need "
            "joblib and engine.workers 1: start one job per GPU, each with --shard i/N and CUDA_VISIBLE_DEVICES"
        )


@dataclass(frozen=True)
class _Texts:
    """The text substore, its missing shards, and the network that encodes them."""

    network: TextNetwork
    store: Store
    works: list[ShardWork]

    def encode(self, wait: bool) -> None:
        if not self.works:
            return
        texts = [text for work in self.works for text in work.ids]
        if cut := cut_texts(self.network.tokenizer, texts):
            length, total = self.network.config.text.max_length, counted(len(texts), "question text")
            print(
                f"note: {counted(len(cut), f'of {total} has', f'of {total} have')} {length} tokens (text.max_length) "
                f"or more; only the first {length} are read",
                flush=True,
            )
        works = self.works
        while works:
            encode_texts(self.network, self.store, works)
            works = _left_by_others(self.store, works, wait, "question")
        self.network.encoder.to("meta")  # the device's memory is for clips from now on
        torch.cuda.empty_cache()  # workers are other processes, which torch's free memory in this one is no use to

    def add_counts(self, result: ExtractionResult) -> ExtractionResult:
        """`result` with the numbers of texts, as they are now."""
        self.store.catalog.refresh()
        return dataclasses.replace(
            result,
            texts=len(self.store.clip_ids),
            texts_planned=len(self.store.planned_ids),
            texts_left=_count(still_missing(self.works, self.store)),
        )


@dataclass
class _OpenedStore:
    """A config's store, its missing shards, and the statistics so far; `texts` is None without questions."""

    job: ExtractionJob
    store: Store
    works: list[ShardWork]
    texts: _Texts | None
    stats: JobStats = field(default_factory=JobStats)

    def finish(self, dataset: Dataset, job_slice: Slice) -> ExtractionResult:
        """Record the job; returns the state of the store after it."""
        store, config, stats = self.store, self.job.config, self.stats
        store.catalog.refresh()
        clips_left = _count(still_missing(self.works, store))
        if self.works:
            stats = stats if clips_left else dataclasses.replace(stats, skipped=())
            try:
                record_job(config, stats)
            except OSError as error:  # all clips are in the store, which users may share, or which is its own mount
                if error.errno not in NOT_ALLOWED:
                    raise
                print(f"note: {error.filename}: {error.strerror}; no forecast knows the times of this job", flush=True)
        catalog = store.catalog
        # A store may also have clips that the annotations no longer name.
        ids = {clip.clip_id for clip in dataset.clips}
        mine = [clip for clip in dataset.clips if job_slice.has(catalog.shard_of(catalog.rows[clip.clip_id]))]
        result = ExtractionResult(
            stats=stats,
            clips=len(ids & catalog.ledger.clips.keys()),
            planned=len(ids),
            others=len(catalog.ledger.clips.keys() - ids),
            quarantine={clip_id: record.reason for clip_id, record in store.quarantine.items() if clip_id in ids},
            reconstruction_error=dict(store.reconstruction_error),
            check=compare_origins(mine, config.data.root, store.origins()),
            machines=store.machines(),
            clips_left=clips_left,
        )
        return result if self.texts is None else self.texts.add_counts(result)


def _open(job: ExtractionJob, dataset: Dataset, retry: bool, job_slice: Slice, refresh: bool) -> _OpenedStore:
    """Open or create a config's store."""
    config = job.config
    root = config.data.root
    if not refresh:
        # Checked before the store gets rows for new clips, which may belong to another data set.
        check = compare_origins(dataset.clips, root, read_ledger(config.store.path).origins())
        if check.stale:
            raise StoreError(f"store.path is {config.store.path}: {check.stale_line()}")
    ids = [clip.clip_id for clip in dataset.clips]
    network = None
    if dataset.texts:
        network = find_text_network(config, job.network, job.device, job.checkpoint)
        _ = network.spec  # before the store is created: a wrong text.model leaves nothing behind
    store = create_store(config.store.path, job.spec, job.fingerprint, ids, format=config.store.format)
    texts = None if network is None else _open_texts(network, dataset.texts, job_slice)
    stale = compare_origins(dataset.clips, root, store.origins()).stale if refresh else {}
    # A store may hold clips of a larger data set; only those of this one have videos to encode.
    clips = set(ids)
    works = [
        dataclasses.replace(work, ids=known)
        for work in job_slice.of(store.missing_shards(retry_quarantined=retry, replace=stale))
        if (known := tuple(clip_id for clip_id in work.ids if clip_id in clips))
    ]
    if refusal := disk_refusal(config.store.path, job.spec, _count(works)):
        raise StoreError(refusal)
    return _OpenedStore(job, store, works, texts)


def _open_texts(network: TextNetwork, texts: Sequence[str], job_slice: Slice) -> _Texts:
    store = create_text_store(network, texts)
    return _Texts(network, store, job_slice.of(store.missing_shards()))


def _count(works: Sequence[ShardWork]) -> int:
    return sum(len(work.ids) for work in works)


def _left_by_others(store: Store, works: list[ShardWork], wait: bool, unit: str) -> list[ShardWork]:
    """If `wait`, wait until one of `works` can be leased, and return those that are then still missing; else none."""
    announce_at = time.monotonic()
    while wait:
        store.catalog.refresh()
        works = still_missing(works, store)
        held = ""
        for work in works:
            try:
                with store.lease(work.shard):
                    return works
            except ShardOwned as error:
                held = held or str(error)
        if not works:
            return []
        # Again and again, because the last holder may be a machine that is gone, which releases nothing.
        if time.monotonic() >= announce_at:
            about = f"waiting for {counted(_count(works), unit)} in shards that other processes hold"
            print(f"{about}; {held}", flush=True)
            announce_at += WAIT_ANNOUNCE_S
        time.sleep(WAIT_POLL_S)
    return []


def _encode_questions_of_imported(config: Config, job_slice: Slice, wait: bool) -> ExtractionResult:
    """Encode the questions for a store of `egopatch features import`, which must have all clips of the data set."""
    dataset = load_dataset(config.data)
    if not dataset.texts:
        lacks = "data.questions is null" if config.data.name == "jsonl" else f"data set {config.data.name} has no texts"
        remedy = "name a file of questions" if config.data.name == "jsonl" else "give its Dataset questions and texts"
        raise ConfigError(f"encoder.arch is imported, and {lacks}, so there is nothing to encode; {remedy}")
    store = open_store(config.store.path)
    if store.fingerprint.fields.get("origin") != "imported":
        raise ConfigError(
            f"encoder.arch is imported, but store {store.path} was encoded, not imported; set encoder.arch to the "
            "network that encoded it, or use another store.path"
        )
    if missing := {clip.clip_id for clip in dataset.clips}.difference(store.clip_ids):
        total = counted(len(dataset.clips), "clip")
        raise StoreError(
            f"the imported store {store.path} has no features for {len(missing)} of {total}, such as "
            f"{min(missing)!r}; import features for all clips, or remove these clips and their questions from the "
            "annotations"
        )
    device = device_of(config.encoder.device)
    network = find_text_network(config, find_network(config.encoder.arch), device, None)
    texts = _open_texts(network, dataset.texts, job_slice)
    texts.encode(wait)
    return texts.add_counts(ExtractionResult(JobStats(), len(store.clip_ids), len(store.planned_ids)))
