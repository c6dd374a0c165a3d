"""How each library names the tensors of a retriever: to our names, and back.

Our names are those of colpali-engine: `visual.*`, `language_model.*`, `custom_text_proj.*`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from colfolio.errors import CheckpointError
from colfolio.models.contract import PROJECTION

_TEXT, _VISION = "language_model.", "visual."


@dataclass(frozen=True, slots=True)
class Layout:
    """The names that one library, in some of its releases, gives to the tensors of a retriever.

    Args:
        prefixes: theirs and ours; no two of theirs begin alike.
        dropped: tensors of parts that a retriever does not have.
    """

    prefixes: tuple[tuple[str, str], ...]
    dropped: frozenset[str] = frozenset()

    def ours(self, name: str) -> str | None:
        """Our name of a tensor that they name so; None if they name none so."""
        for theirs, ours in self.prefixes:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return None

    def theirs(self, name: str) -> str:
        """Their name of a tensor that we name so."""
        for theirs, ours in self.prefixes:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        raise AssertionError(f"{name}: no tensor of a retriever")

    def num_unknown(self, names: Iterable[str]) -> int:
        """Tensors that this layout has no place for."""
        return sum(name not in self.dropped and self.ours(name) is None for name in names)


def _decoder(at: str) -> tuple[tuple[str, str], ...]:
    """A text decoder whose parts lie side by side with other parts of the model."""
    return tuple((at + part, _TEXT + part) for part in ("layers.", "embed_tokens.", "norm."))


_HEAD = frozenset({"lm_head.weight"})
ENGINE = Layout(((PROJECTION, PROJECTION), (_TEXT, _TEXT), (_VISION, _VISION)))
# Qwen2-VL and Qwen2.5-VL as published, and retrievers merged before transformers 4.52
HUB = Layout(((PROJECTION, PROJECTION), (_VISION, _VISION), *_decoder("model.")), _HEAD)
# transformers from 4.52, with a language-model head; Qwen3-VL as published
NESTED = Layout(
    ((PROJECTION, PROJECTION), ("model." + _TEXT, _TEXT), ("model." + _VISION, _VISION)), _HEAD
)
_HEAD_INSIDE = frozenset({"vlm.lm_head.weight"})
_RETRIEVAL_PROJECTION = ("embedding_proj_layer.", PROJECTION)
RETRIEVAL = Layout((_RETRIEVAL_PROJECTION, ("vlm." + _TEXT, _TEXT), ("vlm." + _VISION, _VISION)))
# `ColQwen2ForRetrieval` of transformers 4: the model inside it had a head, then a level more
_RETRIEVAL_NESTED = Layout(
    (_RETRIEVAL_PROJECTION, ("vlm.model." + _TEXT, _TEXT), ("vlm.model." + _VISION, _VISION)),
    _HEAD_INSIDE,
)
_RETRIEVAL_FIRST = Layout(
    (_RETRIEVAL_PROJECTION, ("vlm." + _VISION, _VISION), *_decoder("vlm.model.")), _HEAD_INSIDE
)

LAYOUTS = {
    "colpali-engine": (ENGINE, HUB, NESTED),
    "transformers": (RETRIEVAL, _RETRIEVAL_NESTED, _RETRIEVAL_FIRST),
    "backbone": (NESTED, HUB, ENGINE),
}


def to_our_names(weights: Mapping[str, Tensor], format: str, origin: str) -> dict[str, Tensor]:
    """The tensors of a file under our names, by the layout of a format that fits them best.

    Names that no layout has keep what they are, so that a strict comparison can list them.

    Raises:
        CheckpointError: two tensors have one name.
    """
    layout = min(LAYOUTS[format], key=lambda one: one.num_unknown(weights))
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in layout.dropped:
            continue
        ours = layout.ours(name) or name
        if ours in renamed:
            raise CheckpointError(f"{origin}: holds {ours} twice, once as {name}")
        renamed[ours] = tensor
    return renamed


def to_their_names(weights: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Tensors of ours under the names of a layout."""
    return {layout.theirs(name): tensor for name, tensor in weights.items()}
