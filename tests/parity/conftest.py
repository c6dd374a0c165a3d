"""The plain path (`transformers` alone, one sequence at a time, unpacked and unpatched), and what
tests against other libraries share."""

import copy

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ProcessorMixin
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.utils import PushToHubMixin

DIMS = {"qwen2_vl": 128, "qwen2_5_vl": 128, "qwen3_vl": 320}  # fixed in colpali-engine


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


class NoVideo(PushToHubMixin):
    """Stands for a video processor, none of which can be made without torchvision."""

    model_input_names = ()
    _auto_class = None

    def to_dict(self):
        return {}


@pytest.fixture
def without_torchvision(monkeypatch):
    """Lets processors of Qwen-VL be made of a tokenizer and an image processor alone."""
    monkeypatch.setattr(AutoVideoProcessor, "from_pretrained", lambda *_, **__: NoVideo())
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)


@pytest.fixture
def make_wide(make_family_retriever):
    """The tiny retriever of a family with as many dimensions as colpali-engine has."""
    return lambda family, **values: make_family_retriever(family, dim=DIMS[family], **values).eval()


@pytest.fixture
def images(pages):
    return [Image.fromarray(page) for page in pages]
