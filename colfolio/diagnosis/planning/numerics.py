"""How a model computes, as far as memory and time depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from colfolio.attention import AttentionKernel
from colfolio.models.precision import SettledPrecision

WIDE = 4  # bytes of a float32


@dataclass(frozen=True, slots=True)
class Numerics:
    """What a recipe leaves to the machine, settled.

    Args:
        precision: of products of matrices.
        attention: the kernel.
        is_cuda: on a GPU autocast takes layer norms to float32, on a CPU it does not.
        is_gathered: weights come from several ranks, in the dtype of products, and go again.
    """

    precision: SettledPrecision
    attention: AttentionKernel
    is_cuda: bool
    is_gathered: bool = False

    @property
    def is_half(self) -> bool:
        """Whether products of matrices run in 16 bits."""
        return self.precision != "fp32"

    @property
    def product_bytes(self) -> int:
        """Of a number in a product of matrices."""
        return 2 if self.is_half else WIDE

    @property
    def copies_weights(self) -> bool:
        """Whether autocast makes a narrow copy of each weight that is used."""
        return self.is_half and not self.is_gathered
