"""What crosses layers: packed token inputs, ragged rows of vectors, batches of both objectives.

Nothing here is padded. Rows lie behind one another in one tensor, and `offsets` says where each
begins: row i is `[offsets[i], offsets[i + 1])`. Offsets and grids are always on the CPU, because
the host needs them to plan which rows share a call; the long tensors may be anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

UNLABELLED = -100  # as `torch.nn.functional.cross_entropy` leaves out


@dataclass(frozen=True, slots=True)
class MultiVectors:
    """Ragged rows of vectors: one row a query or a document, one vector a token.

    Args:
        vectors: `[tokens, dim]`, floating point, any device.
        offsets: int64 `[rows + 1]` on the CPU, starting at 0, never falling, ending at `tokens`.
    """

    vectors: Float[Tensor, "tokens dim"]
    offsets: Int64[Tensor, "rows_and_one"]

    def __post_init__(self) -> None:
        _check_offsets(self.offsets, len(self.vectors), "vectors")

    @classmethod
    def from_list(cls, rows: Sequence[Float[Tensor, "_ dim"]]) -> MultiVectors:
        """Pack rows, each `[tokens_i, dim]`, behind one another."""
        if not rows:
            raise ValueError("from_list needs at least one row: with none, dim is unknown")
        return cls(torch.cat(list(rows)), offsets_of([len(row) for row in rows]))

    @classmethod
    def cat(cls, parts: Sequence[MultiVectors]) -> MultiVectors:
        """All rows of all parts, in order."""
        lengths = torch.cat([part.lengths for part in parts])
        return cls(torch.cat([part.vectors for part in parts]), offsets_of(lengths))

    @property
    def lengths(self) -> Int64[Tensor, " rows"]:
        """Vectors in each row."""
        return self.offsets.diff()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Float[Tensor, "tokens_i dim"]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} rows")
        row %= len(self)
        return self.vectors[int(self.offsets[row]) : int(self.offsets[row + 1])]

    def __iter__(self) -> Iterator[Float[Tensor, "tokens_i dim"]]:
        return (self[row] for row in range(len(self)))

    def select(self, rows: Sequence[int]) -> MultiVectors:
        """The named rows, in the given order."""
        return MultiVectors.from_list([self[row] for row in rows])

    def to(self, target: torch.device | torch.dtype | str) -> MultiVectors:
        """The same rows on another device or in another dtype."""
        return MultiVectors(self.vectors.to(target), self.offsets)


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences of one side of a batch, ready for the model.

    Args:
        token_ids: int64 `[tokens]`.
        offsets: int64 `[rows + 1]` on the CPU.
        position_ids: int64 `[3, tokens]`: temporal, height and width position of each token.
        patches: `[patches, channels * temporal_patch * patch * patch]`, the visual input of all
            rows in order; no rows for text.
        grid_thw: int64 `[grids, 3]` on the CPU: patches in time, height and width of each image.
        grid_offsets: int64 `[rows + 1]` on the CPU: which of the grids belong to each row.
    """

    token_ids: Int64[Tensor, " tokens"]
    offsets: Int64[Tensor, "rows_and_one"]
    position_ids: Int64[Tensor, "3 tokens"]
    patches: Float[Tensor, "patches patch_dim"]
    grid_thw: Int64[Tensor, "grids 3"]
    grid_offsets: Int64[Tensor, "rows_and_one"]

    def __post_init__(self) -> None:
        _check_offsets(self.offsets, len(self.token_ids), "token_ids")
        _check_offsets(self.grid_offsets, len(self.grid_thw), "grid_thw")
        found, needed = len(self.patches), int(self.grid_thw.prod(dim=1).sum())
        if found != needed:
            raise ValueError(f"grids {self.grid_thw.tolist()} need {needed} patches, found {found}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64[Tensor, " rows"]:
        """Tokens in each row."""
        return self.offsets.diff()

    def rows(self, begin: int, end: int) -> Packed:
        """Rows `[begin, end)` as a batch of their own; its tensors are views of these.

        Raises:
            IndexError: there are no such rows.
        """
        if not 0 <= begin <= end <= len(self):
            raise IndexError(f"rows {begin} to {end} of {len(self)} rows")
        tokens = slice(int(self.offsets[begin]), int(self.offsets[end]))
        grids = slice(int(self.grid_offsets[begin]), int(self.grid_offsets[end]))
        patch_offsets = offsets_of(self.grid_thw.prod(dim=1))
        return Packed(
            self.token_ids[tokens],
            self.offsets[begin : end + 1] - tokens.start,
            self.position_ids[:, tokens],
            self.patches[int(patch_offsets[grids.start]) : int(patch_offsets[grids.stop])],
            self.grid_thw[grids],
            self.grid_offsets[begin : end + 1] - grids.start,
        )

    def select(self, rows: Sequence[int]) -> Packed:
        """The named rows, at least one, in the given order, as a batch of their own."""
        parts = [self.rows(row, row + 1) for row in rows]
        return Packed(
            torch.cat([part.token_ids for part in parts]),
            offsets_of([len(part.token_ids) for part in parts]),
            torch.cat([part.position_ids for part in parts], dim=1),
            torch.cat([part.patches for part in parts]),
            torch.cat([part.grid_thw for part in parts]),
            offsets_of([len(part.grid_thw) for part in parts]),
        )

    def to(self, device: torch.device | str, *, with_patches: bool = True) -> Packed:
        """The same sequences with their long tensors on a device; offsets and grids stay.

        Args:
            with_patches: without, they stay where they are: for what was made of them already.
        """
        return Packed(
            self.token_ids.to(device, non_blocking=True),
            self.offsets,
            self.position_ids.to(device, non_blocking=True),
            self.patches.to(device, non_blocking=True) if with_patches else self.patches,
            self.grid_thw,
            self.grid_offsets,
        )


@dataclass(frozen=True, slots=True)
class ContrastiveBatch:
    """Queries, documents, and what each is to the other.

    Of several ranks, each holds its own queries and documents; `positives` and `ignored` are of
    all, in the order of ranks.

    Args:
        queries: one row a query.
        documents: one row a document; a document stands here once, however many queries want it.
        positives: bool `[queries, documents]`, at least one in each row.
        ignored: bool `[queries, documents]`: neither positive nor negative (another view of the
            same page, a near duplicate); never true where `positives` is.
        query_ids, document_ids: int64, a number for each row that is the same whatever batch, chunk
            or rank it comes in: dropout draws from it.
        document_digests: 16 bytes or more for each document, of all that its row was made of: under
            them its frozen features are kept. None: they are not kept.
        teacher: float32 `[queries, documents]` of all ranks, what a teacher scored, NaN where it
            says nothing; for distillation.
    """

    queries: Packed
    documents: Packed
    positives: Bool[Tensor, "all_queries all_documents"]
    ignored: Bool[Tensor, "all_queries all_documents"]
    query_ids: Int64[Tensor, " queries"]
    document_ids: Int64[Tensor, " documents"]
    document_digests: tuple[bytes, ...] | None = None
    teacher: Float[Tensor, "all_queries all_documents"] | None = None

    def to(self, device: torch.device | str) -> ContrastiveBatch:
        """The same batch with its long tensors on a device."""
        return ContrastiveBatch(
            self.queries.to(device),
            self.documents.to(device),
            self.positives.to(device),
            self.ignored.to(device),
            self.query_ids,
            self.document_ids,
            self.document_digests,
            None if self.teacher is None else self.teacher.to(device),
        )


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Rows of tokens, and what is to be predicted in them.

    Args:
        inputs: one row a conversation.
        labels: int64 `[tokens]`: the token that follows in the row, where it is one of an answer,
            and `UNLABELLED` elsewhere.
        row_ids: int64, a number for each row that is the same whatever batch, chunk or rank it
            comes in: dropout draws from it.
    """

    inputs: Packed
    labels: Int64[Tensor, " tokens"]
    row_ids: Int64[Tensor, " rows"]

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.inputs.token_ids) or len(self.row_ids) != len(self.inputs):
            raise ValueError(
                f"{len(self.inputs)} rows of {len(self.inputs.token_ids)} tokens need as many ids "
                f"and labels, received {len(self.row_ids)} and {len(self.labels)}"
            )
        ends = self.inputs.offsets[1:][self.inputs.lengths > 0] - 1
        if (self.labels[ends] != UNLABELLED).any():
            raise ValueError("the last token of a row has a label, but none of its row follows it")

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def num_labels(self) -> int:
        """Tokens that are to be predicted."""
        return int((self.labels != UNLABELLED).sum())

    def rows(self, begin: int, end: int) -> TextBatch:
        """Rows `[begin, end)` as a batch of their own; its tensors are views of these."""
        tokens = slice(int(self.inputs.offsets[begin]), int(self.inputs.offsets[end]))
        return TextBatch(self.inputs.rows(begin, end), self.labels[tokens], self.row_ids[begin:end])


def offsets_of(lengths: Sequence[int] | Int64[Tensor, " rows"]) -> Int64[Tensor, "rows_and_one"]:
    """Where each of the rows of these lengths begins, and where the last ends.

    >>> offsets_of([2, 0, 3]).tolist()
    [0, 2, 2, 5]
    """
    ends = torch.as_tensor(lengths, dtype=torch.int64).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def _check_offsets(offsets: Tensor, size: int, name: str) -> None:
    if offsets.device.type != "cpu" or offsets.dtype != torch.int64:
        raise ValueError(
            f"offsets must be int64 on the CPU, not {offsets.dtype} on {offsets.device}"
        )
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != size or (offsets.diff() < 0).any():
        raise ValueError(
            f"offsets must start at 0, never fall, and end at the {size} rows of {name}; "
            f"found {offsets.tolist() if len(offsets) < 20 else offsets[[0, -1]].tolist()}"
        )
