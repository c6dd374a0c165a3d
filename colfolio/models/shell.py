"""A model as its `config.json` describes it, one layer deep, and a call of it as its library makes.

Which positions a model uses is decided by its code and its configuration, not by its weights. So a
shell of one layer a tower, without weights, answers for a model of any size on any machine.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import UInt8
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from colfolio.data.patches import PixelBudget, to_patches
from colfolio.errors import CheckpointError, ColfolioError
from colfolio.models.families import CONFIG_ERRORS
from colfolio.models.files import CONFIG_FILE
from colfolio.models.formats.reading import ADAPTER_FILE
from colfolio.models.grafted import GraftedConfig
from colfolio.mrope import IMAGE, TEXT, VIDEO

_MAX_TOKENS = 256  # of one frame: enough to tell any two grids apart
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_GRID = ("patch_size", "spatial_merge_size", "temporal_patch_size", "depth")
# classes of colpali-engine over these backbones: their forward hands all arguments on
_ENGINE = ("ColQwen2", "ColQwen2_5", "BiQwen2", "BiQwen2_5", "ColQwen3", "BiQwen3")
_NUM_TEXT = 3  # tokens of text before, behind, and where a time stamp stands


@dataclass(frozen=True, slots=True)
class Shell:
    """A model without weights that can be asked which positions it uses.

    Args:
        model: of the class that the configuration names, or of the one whose forward that calls.
        config: of the vision-language model inside it.
        architecture: the class that the configuration names.
    """

    model: nn.Module
    config: Any
    architecture: str

    @property
    def name(self) -> str:
        """Its class, and whose forward that is."""
        name = type(self.model).__name__
        if self.architecture in ("", name):
            return name
        return f"{name} (whose forward {self.architecture} of colpali-engine calls)"

    @property
    def takes_clips(self) -> bool:
        """Whether its forward has a place for video."""
        return "pixel_values_videos" in _parameters(self.model)

    def blank(self, num_frames: int) -> UInt8[np.ndarray, "T H W 3"]:
        """White frames of 2 x 3 tokens: the smallest whose height and width are not alike."""
        vision = self.config.vision_config
        side = vision.patch_size * vision.spatial_merge_size
        return np.full((num_frames, 2 * side, 3 * side, 3), 255, dtype=np.uint8)

    def inputs(
        self, frames: UInt8[np.ndarray, "T H W 3"], kind: int, seconds_per_frame: float = 0.5
    ) -> dict[str, Tensor]:
        """Arguments of one call on an image (one frame) or a clip, as the library's processor does.

        Args:
            kind: `IMAGE` or `VIDEO`.
            seconds_per_frame: of a clip.

        Raises:
            ColfolioError: the model takes no clips.
        """
        vision, names = self.config.vision_config, _parameters(self.model)
        if kind == VIDEO and not self.takes_clips:
            raise ColfolioError(f"{type(self.model).__name__} takes images only, no clips")
        budget = PixelBudget(
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            temporal_patch=vision.temporal_patch_size,
            max_pixels=_MAX_TOKENS * (vision.patch_size * vision.spatial_merge_size) ** 2,
            min_pixels=1,
        )
        patches, grids = to_patches([frames], budget)
        if self._stacks_pages:
            patches = patches.unsqueeze(0)  # [pages, patches, patch_dim], padded by its processor
        token_ids = self._token_ids(grids[0].tolist(), kind)
        prefix, suffix = ("image", "") if kind == IMAGE else ("video", "_videos")
        seconds = torch.tensor([seconds_per_frame * vision.temporal_patch_size])
        known = {
            "input_ids": token_ids,
            "attention_mask": torch.ones_like(token_ids),
            "mm_token_type_ids": self._token_types(token_ids),
            f"pixel_values{suffix}": patches,
            f"{prefix}_grid_thw": grids,
            "second_per_grid_ts": seconds if kind == VIDEO else None,
            "use_cache": False,
            "logits_to_keep": 1,
        }
        return {name: value for name, value in known.items() if name in names and value is not None}

    @property
    def _stacks_pages(self) -> bool:
        return type(self.model).__name__.startswith("ColQwen")

    def _token_types(self, token_ids: Tensor) -> Tensor:
        types = torch.full_like(token_ids, TEXT)
        types[token_ids == self.config.image_token_id] = IMAGE
        types[token_ids == self.config.video_token_id] = VIDEO
        return types

    def _token_ids(self, grid: list[int], kind: int) -> Tensor:
        """Text, the placeholders between their marks, text: int64 `[1, length]`."""
        config, merge = self.config, self.config.vision_config.spatial_merge_size
        text = [_plain_token(config)] * _NUM_TEXT
        frames, visual = grid[0], grid[1] // merge * (grid[2] // merge)
        pad = config.image_token_id if kind == IMAGE else config.video_token_id
        if config.model_type.startswith("qwen3") and kind == VIDEO:
            around = [config.vision_start_token_id, *[pad] * visual, config.vision_end_token_id]
            return torch.tensor([(text + around) * frames + text])
        around = [config.vision_start_token_id, *[pad] * visual * frames]
        return torch.tensor([[*text, *around, config.vision_end_token_id, *text]])


def shell_of(folder: Path) -> Shell:
    """The model that a folder's `config.json` names, one layer deep and without weights.

    Raises:
        CheckpointError: no configuration, one that no model can have, one of a class whose code is
            not known here, or of a model that reads no images as the Qwen-VL families do.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(_without_config(folder))
    try:
        _check_known(json.loads(path.read_text(encoding="utf-8")), path)
        config = AutoConfig.from_pretrained(folder)
        inner = getattr(config, "vlm_config", config)
        _check_kind(inner, path)
        _cut(inner)
        architecture = (config.architectures or [""])[0]
        builder = _builder(architecture, path)
        with torch.device("meta"):
            model = builder(config)
    except CheckpointError:
        raise
    except (*CONFIG_ERRORS, OSError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: cannot be built: {reason}") from None
    # in float32, because a configuration may ask for half precision in one part alone
    return Shell(model.float().to_empty(device="cpu").eval(), inner, architecture)


def _check_known(values: Any, path: Path) -> None:
    """Refuse what is ours alone: no library calls it but Colfolio, which makes its positions."""
    if isinstance(values, dict) and values.get("model_type") == GraftedConfig.model_type:
        raise CheckpointError(
            f"{path}: a grafted decoder has no library of its own to be asked; load it by "
            "`Retriever.from_pretrained` and put `colfolio.mrope.watch(retriever)` around a call"
        )


def _without_config(folder: Path) -> str:
    if (folder / ADAPTER_FILE).is_file():
        return (
            f"{folder}: holds an adapter; ask the model that `base_model_name_or_path` in its "
            f"{ADAPTER_FILE} names, because adapters change no positions"
        )
    return f"{folder}: no {CONFIG_FILE}, so this is no checkpoint"


def _builder(architecture: str, path: Path) -> Any:
    """What makes a model of the class that a configuration names."""
    known = getattr(transformers, architecture, None) if architecture else None
    if isinstance(known, type) and issubclass(known, PreTrainedModel):
        return known
    if architecture and architecture not in _ENGINE:
        raise CheckpointError(
            f"{path}: names the class {architecture!r}, which is none of transformers; put "
            "`colfolio.mrope.watch(model)` around a call of your own"
        )
    # classes of colpali-engine call the forward of their backbone
    return AutoModel.from_config


def _check_kind(config: Any, path: Path) -> None:
    """Refuse a model that does not read images as the Qwen-VL families do."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise CheckpointError(
            f"{path}: a {config.model_type} reads no images by itself; if M-RoPE is grafted onto "
            "it, put `colfolio.mrope.watch(model)` around the call that you make"
        )
    missing = [name for name in _TOKENS if not hasattr(config, name)]
    missing += [f"vision_config.{name}" for name in _GRID if not hasattr(vision, name)]
    if missing:
        raise CheckpointError(
            f"{path}: a {config.model_type} does not read images as the Qwen-VL families do (it "
            f"has no {', '.join(missing)}); put `colfolio.mrope.watch(model)` around your own call"
        )
    sizes = {name: getattr(vision, name) for name in _GRID}
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise CheckpointError(f"{path}: sizes in vision_config must be above 0, found {sizes}")


def _cut(config: Any) -> None:
    """Leave one layer in each tower, in place."""
    text = config.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    config.vision_config.depth = 1


def _plain_token(config: Any) -> int:
    """A token id that means nothing to the model's code."""
    special = {value for name, value in vars(config).items() if name.endswith("token_id")}
    return next(number for number in range(1, 100) if number not in special)


def _parameters(model: nn.Module) -> frozenset[str]:
    """Arguments of a model's forward; of the class it derives from, where it passes all on."""
    for kind in type(model).__mro__:
        names = inspect.signature(kind.forward).parameters
        if "input_ids" in names:
            return frozenset(names)
    raise ColfolioError(f"{type(model).__name__}: its forward takes no input_ids")
