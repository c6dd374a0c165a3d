"""Bytes that a generator's head and loss take, which are large: a row of the vocabulary a token.

Letters: A answer tokens of a chunk, V the vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from colfolio.diagnosis.planning.numerics import WIDE, Numerics
from colfolio.models.generator import Generator
from colfolio.models.generator_files import TiedHead

_INDEX = 8  # bytes of a place, and of a label


@dataclass(frozen=True, slots=True)
class HeadMemory:
    """What stands above the towers in a graph; of a retriever nothing.

    Args:
        held: from the end of forward to the beginning of backward.
        working: beside that and all else, at the highest moment of its own backward.
        carried: from its backward to the end of all.
    """

    held: int = 0
    working: int = 0
    carried: int = 0


def head_memory(generator: Generator, answers: int, numerics: Numerics) -> HeadMemory:
    """What logits and loss of some answer tokens take."""
    vocabulary, hidden = generator.projection.weight.shape
    is_trained = generator.projection.weight.requires_grad
    weights = vocabulary * hidden
    logits = answers * vocabulary * WIDE
    held = logits + answers * 2 * _INDEX  # the logarithms of the softmax
    held += answers * hidden * numerics.product_bytes if is_trained else 0
    held += weights * numerics.product_bytes if numerics.copies_weights else 0
    # a gradient in half precision is made wide before it is added
    gradient = weights * (2 + WIDE if numerics.is_half else WIDE) if is_trained else 0
    # in the dtype of products, or in float32 in another order
    copied = answers * vocabulary * numerics.product_bytes
    # first the gradients of the loss and of the softmax; then, of all these, the latter is left
    working = max(2 * logits, copied + gradient)
    is_tied = isinstance(generator.projection, TiedHead)
    # it waits for what reaches the embedding from below
    carried = weights * WIDE if is_tied and is_trained else 0
    return HeadMemory(held, working, carried)
