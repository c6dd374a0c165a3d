"""A retriever's weights in the classes of other libraries, called with padded rows as they call it.

Letters: B rows, L padded length.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import ColQwen2Config, ColQwen2ForRetrieval

from colfolio.batch import Packed
from colfolio.models.checkpoint import assemble
from colfolio.models.retriever import Retriever
from colfolio.mrope import IMAGE, TEXT

Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")


@dataclass(frozen=True, slots=True)
class LibraryModel:
    """Towers and projection without any code of ours in them.

    Args:
        model: `ColQwen2ForRetrieval`; None for libraries that call the backbone by itself, with
            token ids, token types and grids, as colpali-engine and sentence-transformers do.
    """

    backbone: Any
    projection: nn.Module
    model: Any = None

    @torch.no_grad()
    def rows(self, packed: Packed, side: Side, padding: int) -> list[Float[Tensor, "_tokens dim"]]:
        """The vectors of each row of a batch that is padded on a side.

        Args:
            padding: tokens beyond those of the longest row.
        """
        ids, mask = _padded(packed, side, padding, self._padding_id)
        is_image = ids == self.backbone.config.image_token_id
        shared = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if self.model is not None:
            vectors = self.model(**shared, **_stacked(packed)).embeddings
        else:
            types = torch.where(is_image, IMAGE, TEXT)
            visual = {"pixel_values": packed.patches, "image_grid_thw": packed.grid_thw}
            given = visual if len(packed.grid_thw) else {}
            hidden = self.backbone(**shared, mm_token_type_ids=types, **given).last_hidden_state
            states = hidden.to(next(self.projection.parameters()).dtype)
            vectors = F.normalize(self.projection(states).float(), dim=-1)
        return [row[real.bool()].float() for row, real in zip(vectors, mask, strict=True)]

    @property
    def _padding_id(self) -> int:
        """A token that is no image; which one does not matter behind a mask."""
        return 0 if self.backbone.config.image_token_id else 1


def library_model(
    retriever: Retriever, weights: dict[str, Tensor], *, is_retrieval: bool
) -> LibraryModel:
    """The model that a library makes of these weights, which are shared, on the CPU.

    Args:
        weights: of the retriever, on the CPU.
        is_retrieval: whether its class is `ColQwen2ForRetrieval`.
    """
    config = copy.deepcopy(retriever.backbone.config)
    for part in (config, config.get_text_config(), config.vision_config):
        part._attn_implementation = "sdpa"
    backbone, projection = assemble(config, weights, retriever.dim, "check")
    backbone.eval()
    if not is_retrieval:
        return LibraryModel(backbone, projection)
    with torch.device("meta"):
        model = ColQwen2ForRetrieval(
            ColQwen2Config(vlm_config=config.to_dict(), embedding_dim=retriever.dim)
        )
    model.vlm, model.embedding_proj_layer = backbone, projection
    return LibraryModel(backbone, projection, model.eval())


def _padded(packed: Packed, side: Side, padding: int, padding_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 `[B, L]`."""
    rows = packed.token_ids.split(packed.lengths.tolist())
    length = max(len(row) for row in rows) + padding
    ids = torch.full((len(rows), length), padding_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def _stacked(packed: Packed) -> dict[str, Tensor]:
    """Patches of each page padded to those of the largest, as the processor of the class does."""
    if not len(packed.grid_thw):
        return {}
    counts = packed.grid_thw.prod(dim=1).tolist()
    pages = nn.utils.rnn.pad_sequence(list(packed.patches.split(counts)), batch_first=True)
    return {"pixel_values": pages, "image_grid_thw": packed.grid_thw}
