"""Around a model that encodes: batches of like length, evaluation mode, scores of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from colfolio.batch import MultiVectors
from colfolio.maxsim import maxsim

# Told after each batch: how many rows are encoded, and of how many.
OnProgress = Callable[[int, int], None]

# Document vectors on the device at a time: 512 MiB of 128 dimensions in float32.
_SCORED_AT_A_TIME = 1 << 20


def listed_texts(queries: Sequence[str]) -> list[str]:
    """The queries as a list.

    Raises:
        TypeError: it is one text in place of several, or one of them is no text.
    """
    if isinstance(queries, str):
        raise TypeError(f"encode_queries takes a list of texts, received one: {queries!r}")
    texts = list(queries)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"query {row} is a {type(text).__name__}; a query is a text")
    return texts


def batches_by_length(
    lengths: Sequence[int], batch_size: int, most_tokens: int | None = None
) -> list[list[int]]:
    """Rows in batches of like length, the longest first, so that too little memory shows at once.

    Args:
        batch_size: rows in a batch, at most.
        most_tokens: of the rows of a batch together; a longer row is a batch of its own.

    Raises:
        ValueError: the batch size is below 1.

    >>> batches_by_length([2, 9, 2, 3], batch_size=2, most_tokens=8)
    [[1], [3, 0], [2]]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    batches: list[list[int]] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        tokens += lengths[row]
        is_full = not batches or len(batches[-1]) == batch_size
        if is_full or (most_tokens is not None and tokens > most_tokens):
            batches.append([])
            tokens = lengths[row]
        batches[-1].append(row)
    return batches


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode inside; afterwards each submodule is in the mode it was found in."""
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True


def scores_on(
    device: torch.device, queries: MultiVectors, documents: MultiVectors
) -> Float[Tensor, "queries documents"]:
    """MaxSim computed on a device, given back on the CPU; documents travel some at a time."""
    queries = queries.to(device)
    columns = [maxsim(queries, part.to(device)).cpu() for part in _parts(documents)]
    return torch.cat(columns, dim=1) if columns else torch.zeros(len(queries), 0)


def _parts(documents: MultiVectors) -> Iterator[MultiVectors]:
    offsets, begin = documents.offsets, 0
    while begin < len(documents):
        fitting = torch.searchsorted(offsets, offsets[begin] + _SCORED_AT_A_TIME, right=True)
        end = max(begin + 1, int(fitting) - 1)
        vectors = documents.vectors[int(offsets[begin]) : int(offsets[end])]
        yield MultiVectors(vectors, offsets[begin : end + 1] - offsets[begin])
        begin = end
