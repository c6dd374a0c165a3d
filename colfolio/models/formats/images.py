"""How images enter a checkpoint of another library: its processor files, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from colfolio.config import validated
from colfolio.data.patches import PixelBudget
from colfolio.errors import CheckpointError, RecipeError
from colfolio.models.families import family_of
from colfolio.models.files import read_json, write_json

PROCESSOR_FILE = "processor_config.json"
IMAGE_FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"

# What `Qwen2VLImageProcessor` of transformers takes where its file says nothing.
_DEFAULTS: dict[str, Any] = {
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 1280,
    "image_mean": PixelBudget().mean,
    "image_std": PixelBudget().std,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}
_NAMES = {
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
    "image_mean": "mean",
    "image_std": "std",
    "patch_size": "patch",
    "merge_size": "merge",
    "temporal_patch_size": "temporal_patch",
}
# What our images always go through: a file that says otherwise cannot be honoured.
_FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,  # bicubic
}


def pixel_budget_of(
    folder: Path, config: PretrainedConfig, changes: Mapping[str, Any] | None = None
) -> tuple[PixelBudget, list[str]]:
    """The pixel budget that the processor files of a folder say, and what had to be assumed.

    Args:
        changes: values that a library puts over those of the files.

    Raises:
        CheckpointError: the files ask for something else than resizing, scaling and normalising.
    """
    values, path = _image_values(folder)
    if values is None:
        family = family_of(config.model_type, str(folder))
        return family.pixel_budget, [
            f"no {IMAGE_FILE} says how large images enter: {family.pixel_budget.min_pixels:,} to "
            f"{family.pixel_budget.max_pixels:,} pixels are taken, and the normalisation of the "
            "family"
        ]
    said = _said(dict(values) | dict(changes or {}), path)
    silent = [name for name in _DEFAULTS if name not in said]
    budget = {_NAMES[name]: value for name, value in (_DEFAULTS | said).items()}
    try:
        found = validated(budget, PixelBudget, str(path))
    except (RecipeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no pixel budget: {error}") from None
    if not silent:
        return found, []
    defaults = ", ".join(f"{name} {_DEFAULTS[name]}" for name in silent)
    return found, [f"{path.name} leaves out what transformers then takes: {defaults}"]


def write_processor_files(
    budget: PixelBudget, model_type: str, folder: Path, processor: str, **values: str
) -> None:
    """Write what a processor of transformers, 4 or 5, reads of images and clips.

    Args:
        processor: its class.
        values: that its class has beside images.
    """
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(budget.mean),
        "image_std": list(budget.std),
        "merge_size": budget.merge,
        "patch_size": budget.patch,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": budget.min_pixels, "longest_edge": budget.max_pixels},
        "temporal_patch_size": budget.temporal_patch,
        "processor_class": processor,
    }
    limits = {"min_pixels": budget.min_pixels, "max_pixels": budget.max_pixels}
    image = common | limits | {"image_processor_type": "Qwen2VLImageProcessor"}
    write_json(image, folder / IMAGE_FILE)
    video = "Qwen3VLVideoProcessor" if model_type == "qwen3_vl" else "Qwen2VLVideoProcessor"
    write_json(common | {"video_processor_type": video}, folder / VIDEO_FILE)
    write_json({"processor_class": processor} | values, folder / PROCESSOR_FILE)


def _image_values(folder: Path) -> tuple[Mapping[str, Any] | None, Path]:
    """Values of the image processor; transformers 5 puts them into the file of the processor."""
    path = folder / PROCESSOR_FILE
    if path.is_file():
        nested = read_json(path).get("image_processor")
        if isinstance(nested, dict):
            return nested, path
    path = folder / IMAGE_FILE
    return (read_json(path), path) if path.is_file() else (None, path)


def _said(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Those of the seven values that a file says, by the names it has at the top."""
    wrong = [
        f"{name} {values[name]!r}"
        for name, ours in _FIXED.items()
        if values.get(name, ours) != ours
    ]
    factor = values.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > 1e-6:
        wrong.append(f"rescale_factor {factor!r}")
    if wrong:
        raise CheckpointError(
            f"{path}: images are resized (bicubic), divided by 255 and normalised here; "
            f"it asks otherwise: {', '.join(wrong)}"
        )
    size = values.get("size")
    edges = size if isinstance(size, dict) else {}
    given = {name: values.get(name) for name in _DEFAULTS}
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if given[name] is None:  # the older name wins where a file has both
            given[name] = edges.get(edge, edges.get(name))
    return {name: value for name, value in given.items() if value is not None}
