"""Tokens of clips and states of texts, from disk, memory or the GPU, as batches.

Shape legend: C clips of a batch, B questions, D channels, W text tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from egopatch.features import AbsentClip, PatchTokens, Store, StoreError, read_ahead
from egopatch.features.common.units import counted
from egopatch.features.values.dtypes import spec_row_bytes
from egopatch.train.data.batch import Batch, Options, RankSlice
from egopatch.train.data.batch_size import BatchSize
from egopatch.train.data.question_table import NO_CLASS, NO_OPTION, QuestionTable
from egopatch.train.data.residency import MEMORY_SHARE, ClipsInMemory, Residency, choose_residency
from egopatch.train.processes.distributed import ALONE, Distributed

# Clips read at once while filling the GPU; bounds the extra memory.
READ_CLIPS = 64
# Clips that a head derives from at once: float32 takes several times the memory of their tokens.
DERIVED_CLIPS = 32
# Threads that read the clips of one batch.
READ_THREADS = 2


class Features:
    """Tokens of clips and states of texts, from disk, memory or the GPU.

    Args:
        store: The clips' store; None for heads that read no video.
        text_store: The texts' store; None for heads that read no text.
        clip_ids: Encoded clips that batches will request, each once.
        texts: Texts that batches will request, each once; their positions are the rows.
        residency: `train.residency` of the config.
        device: Device of the batches.
        ranks: Processes that share the clips. Each reads and holds only its own.

    Attributes:
        residency: Where the clips are kept; of no meaning for heads that read no video.
        residency_line: Log line on where the features are kept.
        bytes_read: Bytes read from the stores so far.

    Raises:
        StoreError: Texts are not in the store, or a clip cannot be read.
        ValueError: As in `choose_residency`.
    """

    def __init__(
        self,
        store: Store | None,
        text_store: Store | None,
        clip_ids: Sequence[str],
        texts: Sequence[str],
        residency: Residency | Literal["auto"],
        device: torch.device,
        ranks: Distributed = ALONE,
    ) -> None:
        self.device = device
        self.ranks = ranks
        self.store = store
        self.bytes_read = 0
        self.residency_line = "features: no video is read"
        self._resident: PatchTokens | None = None
        self._derived: Tensor | None = None
        self._clip_rows: dict[str, int] = {}
        self.residency: Residency = "ram"
        rank_clips = clip_ids[ranks.rank :: ranks.size]
        self._rank_clips = frozenset(rank_clips)
        if store is not None:
            nbytes = len(clip_ids) * spec_row_bytes(store.spec)
            self.residency, self.residency_line = ranks.broadcast(
                lambda: choose_residency(residency, nbytes, device, ranks)
            )
            if self.residency != "disk":
                self._resident = self._load(rank_clips)
                self._clip_rows = {name: row for row, name in enumerate(rank_clips)}
        self._states, self._mask = self._load_texts(text_store, texts)

    def _load_texts(self, store: Store | None, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if store is None:
            shape = (len(texts), 1)
            states = torch.zeros(*shape, 1, device=self.device)
            return states, torch.ones(shape, dtype=torch.bool, device=self.device)
        try:
            read = store.read_text(texts)
        except AbsentClip as error:
            raise StoreError(
                f"{counted(len(error.ids), 'question text is', 'question texts are')} missing from {store.path}, "
                f"such as {error.ids[0]!r}; run `egopatch extract run --config CONFIG` to encode them"
            ) from None
        self.bytes_read += read.states.nbytes
        longest = int(read.attention_mask.sum(1).max()) if texts else 1
        states, mask = read.states[:, :longest], read.attention_mask[:, :longest]
        return states.contiguous().to(self.device), mask.contiguous().to(self.device)

    def _load(self, clips: Sequence[str]) -> PatchTokens:
        """Tokens of all `clips`, in memory or on the GPU."""
        assert self.store is not None
        if self.residency == "ram":
            return self._read(clips)
        like = self.store.buffers(0).tensors()
        resident = {name: t.new_empty(len(clips), *t.shape[1:], device=self.device) for name, t in like.items()}
        start = 0
        chunks = [clips[n : n + READ_CLIPS] for n in range(0, len(clips), READ_CLIPS)]
        for chunk in self._read_ahead(self.store, chunks):
            for name, tensor in chunk.tensors().items():
                resident[name][start : start + len(tensor)].copy_(tensor)
            start += len(chunk.cls)
        return PatchTokens(**resident)

    def derive(self, call: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        """Compute `Batch.derived` of all clips once, if they are on a GPU that has room for it.

        Args:
            call: Maps patches [c, T, n, D] and their scale [c, T, n], if any, to a tensor [c, ...].
        """
        resident = self._resident
        if resident is None or self._derived is not None or self.residency != "gpu":
            return
        patches, scale, count = resident.patches, resident.scale, len(resident.cls)
        for start in range(0, count, DERIVED_CLIPS):
            chunk = slice(start, start + DERIVED_CLIPS)
            made = call(patches[chunk], None if scale is None else scale[chunk])
            if self._derived is None:
                nbytes = count * made[0].nbytes
                if nbytes > MEMORY_SHARE * torch.cuda.mem_get_info(self.device)[0]:
                    return
                self._derived = made.new_empty(count, *made.shape[1:])
            self._derived[chunk] = made

    def _read(self, clips: Sequence[str]) -> PatchTokens:
        assert self.store is not None
        return self._count(self.store.read(clips, threads=READ_THREADS))

    def _read_ahead(self, source: Store | ClipsInMemory, batches: Sequence[Sequence[str]]) -> Iterator[PatchTokens]:
        """Tokens of each batch on the device. On a CPU their memory is reused once the next batch is requested."""
        for tokens in read_ahead(source, batches, threads=READ_THREADS, device=self.device):
            if source is self.store:
                self._count(tokens)
            yield tokens.to(self.device, non_blocking=True)

    def _count(self, tokens: PatchTokens) -> PatchTokens:
        self.bytes_read += sum(tensor.nbytes for tensor in tokens.tensors().values())
        return tokens

    def tokens(self, clips: Sequence[str]) -> PatchTokens:
        """A copy of the tokens of encoded clips, on the device; read from the store unless this rank holds them all."""
        if self._resident is None or not self._clip_rows.keys() >= set(clips):
            return self._read(clips).to(self.device)
        rows = self._rows(clips).to(self._resident.cls.device)
        return PatchTokens(**{name: tensor[rows] for name, tensor in self._resident.tensors().items()}).to(self.device)

    def _send(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device. Without pinned memory, a copy would wait for all pending work of the GPU."""
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    @property
    def _in_place(self) -> bool:
        """Whether heads read the resident clips in place, without a copy."""
        return self._resident is not None and (self.residency == "gpu" or self.device.type == "cpu")

    def _rows(self, clips: Sequence[str]) -> Tensor:
        return torch.tensor([self._clip_rows[name] for name in clips], dtype=torch.long)

    def text_tokens(self, texts: Tensor) -> Tensor:
        """[W, D] states of every token of the unique texts of these rows; `NO_OPTION` has none."""
        unique = texts[texts != NO_OPTION].unique().to(self.device)
        return self._states[unique][self._mask[unique]]

    def batch(
        self, table: QuestionTable, rows: np.ndarray, rank_clips: Tensor | None = None, size: BatchSize | None = None
    ) -> Batch:
        """The batch of these rows of `table`; only this rank's rows if `rank_clips` [C] bool marks its clips.

        It is padded to `size`, unless it is larger.
        """
        index = _BatchIndex.of(table, rows, rank_clips)
        if size is not None and size.holds(BatchSize.of(table, index.rows)):
            index = index.padded_to(size)
        if self.store is None or not index.clips:
            return self._batch(table, index, None)
        if not self._in_place:
            return self._batch(table, index, self.tokens(index.clips))
        return self._batch(table, index, self._resident, self._send(self._rows(index.clips)))

    def _batch(
        self, table: QuestionTable, index: "_BatchIndex", stored: PatchTokens | None, clip_rows: Tensor | None = None
    ) -> Batch:
        states, mask, text_index = self._texts(table.text[index.rows], index.size)
        answers = table.answer[index.rows]
        answers[index.questions :] = NO_CLASS
        batch = Batch(
            stored=stored,
            clip_rows=clip_rows,
            clip_index=self._send(index.clip_index),
            states=states,
            mask=mask,
            text_index=text_index,
            forms=self._send(table.form[index.rows]),
            answers=self._send(answers),
            rows=index.rows[: index.questions],
            rank_slice=None if index.rank_slice is None else index.rank_slice.sent(self._send),
            options=self._options(table, index),
            derived=self._derived,
            padded=index.size is not None,
        )
        if table.variants is None:
            return batch
        paraphrases, counterfactuals = (self._with_texts(batch, index, texts) for texts in table.variants.T)
        return replace(batch, variants=(paraphrases, counterfactuals))

    def _texts(self, texts: Tensor, size: BatchSize | None) -> tuple[Tensor, Tensor, Tensor]:
        """States [U, L, D] and mask [U, L] of the unique `texts` [B], and the row of each text [B]."""
        unique, index = texts.unique(return_inverse=True)
        unique = self._send(unique if size is None else _repeated(unique, size.texts))
        return self._states[unique], self._mask[unique], self._send(index)

    def _with_texts(self, batch: Batch, index: "_BatchIndex", texts: Tensor) -> Batch:
        """The batch with other texts; `texts` [Q] has one for every question of the table."""
        states, mask, text_index = self._texts(texts[index.rows], index.size)
        rank_slice = None
        if index.rank_slice is not None:
            rank_slice = index.rank_slice.with_texts(texts[index.whole]).sent(self._send)
        return replace(batch, states=states, mask=mask, text_index=text_index, rank_slice=rank_slice)

    def _options(self, table: QuestionTable, index: "_BatchIndex") -> Options | None:
        if table.options is None or table.lengths is None:
            return None
        texts, rows = table.options[index.rows].unique(return_inverse=True)
        absent = int(texts[0] == NO_OPTION) if len(texts) else 0
        texts = texts[absent:]
        texts = self._send(texts if index.size is None else _repeated(texts, index.size.options))
        rows = self._send(rows - absent)
        return Options(self._states[texts], self._mask[texts], rows, self._send(table.lengths[index.rows]))

    def stream(
        self, table: QuestionTable, plan: Sequence[np.ndarray], size: BatchSize | None = None
    ) -> Iterator[Batch]:
        """The batches of `plan` in order, each with only the rows of this rank, which may be none.

        Batches that read resident clips in place are padded to `size`, unless they are larger.

        If clips are copied to the device or read from disk, the next batches are read ahead, into
        memory that is reused: a batch is valid until the next one is requested. Nothing here waits for a GPU's work.
        """
        rank_clips = None
        if self.ranks.size > 1:
            rank_clips = torch.tensor([name in self._rank_clips for name in table.clips], dtype=torch.bool)
        if self.store is None or self._in_place:
            for rows in plan:
                yield self.batch(table, rows, rank_clips, size)
            return
        indexes = [_BatchIndex.of(table, rows, rank_clips) for rows in plan]
        resident = self._resident
        source = self.store if resident is None else ClipsInMemory(resident, self._clip_rows, self.store)
        tokens = self._read_ahead(source, [index.clips for index in indexes if index.clips])
        for index in indexes:
            yield self._batch(table, index, next(tokens) if index.clips else None)


@dataclass(frozen=True)
class _BatchIndex:
    """The questions and clips of a batch that this rank works on.

    Attributes:
        rows: [B] rows of the table.
        whole: Rows of the table of the whole batch, over all ranks.
        clips: Names of the C clips; empty where other ranks have all of them.
        clip_index: [B] index into `clips`.
        rank_slice: As in `Batch`.
        questions: Number of questions; the rows after these pad the batch.
        size: Size that the batch is padded to; None without padding.
    """

    rows: Tensor
    whole: Tensor
    clips: tuple[str, ...]
    clip_index: Tensor
    rank_slice: RankSlice | None
    questions: int
    size: BatchSize | None = None

    @classmethod
    def of(cls, table: QuestionTable, batch: np.ndarray, rank_clips: Tensor | None) -> "_BatchIndex":
        whole = rows = torch.from_numpy(batch)
        rank_slice = None
        if rank_clips is not None:
            rank_slice = RankSlice.of(table.clip[rows], table.text[rows], rank_clips[table.clip[rows]])
            rows = rows[rank_slice.questions]
        clips, clip_index = table.clip[rows].unique(return_inverse=True)
        names = tuple(table.clips[clip] for clip in clips.tolist())
        return cls(rows, whole, names, clip_index, rank_slice, len(rows))

    def padded_to(self, size: BatchSize) -> "_BatchIndex":
        """The batch with its first question and clip repeated."""
        more = size.questions - len(self.rows)
        # The questions of a clip are computed together, so many about a single clip would take longer.
        spread = torch.arange(more) % size.clips
        return replace(
            self,
            rows=_repeated(self.rows, size.questions),
            clips=self.clips + self.clips[:1] * (size.clips - len(self.clips)),
            clip_index=torch.cat([self.clip_index, spread]),
            size=size,
        )


def _repeated(numbers: Tensor, count: int) -> Tensor:
    """`numbers` [n] with the first one repeated at the end, [count]."""
    return torch.cat([numbers, numbers[:1].expand(count - len(numbers))])


def quarantined_clips(store: Store, clip_ids: Sequence[str]) -> frozenset[str]:
    """The clips in `clip_ids`, which lists each once, that could not be encoded.

    Raises:
        StoreError: A clip has neither a row nor an entry in the quarantine.
    """
    without_row = frozenset(clip_ids).difference(store.clip_ids)
    if missing := sorted(without_row - store.quarantine.keys()):
        total = counted(len(clip_ids), "requested clip")
        raise StoreError(
            f"{counted(len(missing), f'of {total} is', f'of {total} are')} missing from {store.path}, such as "
            f"{missing[0]!r}; run `egopatch extract run --config CONFIG` to encode them"
        )
    return without_row
