"""The hash by which an adapter names its base: of weights as they were read, whatever their dtype.

A base may be opened in another dtype than its file has. What an adapter is checked against, when it
is opened, is the file; so the hash is taken before the cast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from colfolio.models.contract import hash_weights

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


@dataclass(frozen=True, slots=True)
class Origin:
    """What a model's weights were when they were built or read.

    Args:
        dtypes: of each tensor, as it has been since.
        weights_hash: of the weights before they were cast to these; empty if they were not.
        bit_sum: of the weights after it.
    """

    dtypes: Mapping[str, torch.dtype]
    weights_hash: str = ""
    bit_sum: int = 0


def origin_of(weights: Mapping[str, Tensor], hash_before: str = "") -> Origin:
    """The origin of weights just built, or just cast.

    Args:
        hash_before: of those that were cast.
    """
    dtypes = {name: tensor.dtype for name, tensor in weights.items()}
    return Origin(dtypes, hash_before, _bit_sum(weights) if hash_before else 0)


def hash_at_origin(origin: Origin, weights: Mapping[str, Tensor]) -> str | None:
    """`hash_weights` of the weights as a file has them, once saved or before they were read.

    Weights that were changed since, as by training, are what a file will have.

    Returns:
        None if they were cast since their origin: no file that is known has them so.
    """
    if any(tensor.dtype != origin.dtypes.get(name) for name, tensor in weights.items()):
        return None
    if origin.weights_hash and _bit_sum(weights) == origin.bit_sum:
        return origin.weights_hash
    return hash_weights(weights)


def _bit_sum(weights: Mapping[str, Tensor]) -> int:
    """A number that training changes for sure; far quicker than a hash, and no proof of intent."""
    total = 0
    for tensor in weights.values():
        bits = tensor.detach().view(_INTEGERS[tensor.element_size()])
        total += int(bits.sum(dtype=torch.int64))
    return total
