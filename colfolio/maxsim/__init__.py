"""Late interaction: packed queries and documents to one float32 score a pair."""

import importlib.util
import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from colfolio.batch import MultiVectors
from colfolio.maxsim.definition import maxsim_by_definition
from colfolio.maxsim.tiled import maxsim_tiled

__all__ = ["maxsim", "maxsim_by_definition"]

# Before Ampere, Triton has no tensor cores for these types, and too little shared memory.
_AMPERE = 8


def maxsim(queries: MultiVectors, documents: MultiVectors) -> Float[Tensor, "queries documents"]:
    """Sum over a query's vectors of the best inner product with a document's vectors.

    Differentiable on both sides. No similarity is kept, only which document vector won; a tie goes
    to the first of the best. A similarity that is not a number is the best there is, and spoils the
    scores that it takes part in and no other. On a GPU, fused kernels compute it where Triton is
    installed and the vectors have 16 or 32 bits (their gradient has none of its own); elsewhere,
    tiles do.

    Args:
        queries: rows of at least one vector, any floating dtype, any device.
        documents: rows of at least one vector of the same dimension, on the same device.

    Returns:
        Scores in float32, or in float64 for vectors in float64.

    Raises:
        ValueError: a row has no vectors, or dimensions or devices differ.

    >>> queries = MultiVectors(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 2]))
    >>> documents = MultiVectors(torch.tensor([[0.5, 0.2], [3.0, 0.1]]), torch.tensor([0, 1, 2]))
    >>> maxsim(queries, documents)
    tensor([[0.7000, 3.1000]])
    """
    if _suits_kernels(queries.vectors) and _suits_kernels(documents.vectors):
        # needs Triton, which not every platform has
        from colfolio.maxsim.cuda import maxsim_fused  # noqa: PLC0415

        return maxsim_fused(queries, documents)
    return maxsim_tiled(queries, documents)


def _suits_kernels(vectors: Tensor) -> bool:
    has_dtype = vectors.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if not vectors.is_cuda or not has_dtype or not _has_triton():
        return False
    return torch.cuda.get_device_capability(vectors.device)[0] >= _AMPERE


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class _Callable(ModuleType):
    """Python binds `colfolio.maxsim` to this package; called, it is the public function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return maxsim(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
