"""The plain path: `transformers` alone, one sequence at a time, unpacked and unpatched."""

import copy

import pytest
import torch
import torch.nn.functional as F


class PlainModel:
    """The weights of a retriever in a fresh backbone, and their gradients by our names."""

    def __init__(self, retriever, attention):
        config = copy.deepcopy(retriever.backbone.config)
        config._attn_implementation = attention
        for part in (config.text_config, config.vision_config):
            part._attn_implementation = attention
        self.backbone = type(retriever.backbone)(config).to(retriever.projection.weight.dtype)
        self.backbone.load_state_dict(retriever.backbone.state_dict(), strict=True)
        self.projection = copy.deepcopy(retriever.projection)
        self.image_token_id = config.image_token_id
        self.video_token_id = config.video_token_id

    def vectors(self, packed):
        """Vectors of all rows, each row run by itself with the library's own positions."""
        patches = iter(packed.patches.split(packed.grid_thw.prod(dim=1).tolist()))
        grids = iter(packed.grid_thw)
        ids = packed.token_ids.split(packed.lengths.tolist())
        return torch.cat([self._row(row, patches, grids) for row in ids])

    def _row(self, token_ids, patches, grids):
        is_clip = token_ids == self.video_token_id
        types = ((token_ids == self.image_token_id).int() + 2 * is_clip.int())[None]
        visual = {}
        if is_clip.any():
            visual = {"pixel_values_videos": next(patches), "video_grid_thw": next(grids)[None]}
        elif types.any():
            visual = {"pixel_values": next(patches), "image_grid_thw": next(grids)[None]}
        positions, _ = self.backbone.get_rope_index(
            token_ids[None], types, visual.get("image_grid_thw"), visual.get("video_grid_thw")
        )
        hidden = self.backbone(
            input_ids=token_ids[None], mm_token_type_ids=types, position_ids=positions, **visual
        ).last_hidden_state[0]
        return F.normalize(self.projection(hidden), dim=-1)

    def gradients(self):
        return gradients_of(self.backbone, self.projection)


def gradients_of(backbone, projection):
    """Gradients by name, a missing one as zero."""
    named = [(f"backbone.{name}", value) for name, value in backbone.named_parameters()]
    named += [(f"projection.{name}", value) for name, value in projection.named_parameters()]
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in named
    }


@pytest.fixture(scope="session")
def plain_model():
    return PlainModel


@pytest.fixture(scope="session")
def own_gradients():
    return lambda retriever: gradients_of(retriever.backbone, retriever.projection)
