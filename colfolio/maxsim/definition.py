"""MaxSim by its definition: the plain path that the fast ones are held against."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from colfolio.batch import MultiVectors


def maxsim_by_definition(
    queries: MultiVectors, documents: MultiVectors
) -> Float[Tensor, "queries documents"]:
    """Sum over a query's vectors of the best inner product with a document's vectors.

    ColBERT, arXiv:2004.12832, equation 3. Returns the dtype of the vectors, at least float32.
    """
    dtype = torch.promote_types(queries.vectors.dtype, torch.float32)
    rows = [
        torch.stack([(q.to(dtype) @ d.to(dtype).T).amax(dim=1).sum() for d in documents])
        for q in queries
    ]
    return torch.stack(rows)
