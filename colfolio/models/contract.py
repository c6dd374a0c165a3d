"""What a checkpoint promises, in a JSON file beside its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from colfolio.config import Settings, validated
from colfolio.data.patches import PixelBudget
from colfolio.data.prompts import Templates
from colfolio.errors import CheckpointError, RecipeError
from colfolio.models.families import family_of

CONTRACT_FILE = "colfolio.json"
_FORMAT = 1


class Contract(Settings):
    """How queries and pages enter a model and what comes out.

    Args:
        format: version of this file.
        dim: dimensions of each vector.
        templates: the strings around a query and an image.
        pixel_budget: how images are resized and cut.
        position_scheme: how position ids are made, a name of `colfolio.mrope`.
        views: how a page is cut into images for this model: `page`, `tiles` or `strips`.
        base_hash: SHA-256 of the base's weights (backbone and projection) as it was first saved.
    """

    format: int = _FORMAT
    dim: int
    templates: Templates
    pixel_budget: PixelBudget
    position_scheme: str
    views: str = "page"
    base_hash: str


def save_contract(contract: Contract, folder: Path) -> None:
    """Write the contract beside the weights."""
    text = json.dumps(contract.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (folder / CONTRACT_FILE).write_text(text + "\n", encoding="utf-8")


def load_contract(folder: Path) -> Contract:
    """Read the contract of a checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format.
    """
    path = folder / CONTRACT_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        contract = validated(values, Contract, str(path))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {CONTRACT_FILE}, so how queries and pages enter this model is unknown; "
            "make a base from it with `colfolio init`"
        ) from None
    except (OSError, ValueError, RecipeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if contract.format != _FORMAT:
        raise CheckpointError(f"{path}: format {contract.format}, this version reads {_FORMAT}")
    return contract


def check_contract(contract: Contract, config: PretrainedConfig, origin: str) -> None:
    """Refuse a contract that its backbone cannot keep.

    Raises:
        CheckpointError: images are cut otherwise than the vision tower reads them, the towers do
            not fit together, or positions are made by another scheme than the family's.
    """
    vision: Any = config.vision_config  # pyright: ignore[reportAttributeAccessIssue]
    budget = contract.pixel_budget
    pairs = {
        "pixel_budget.patch": (budget.patch, vision.patch_size),
        "pixel_budget.merge": (budget.merge, vision.spatial_merge_size),
        "pixel_budget.temporal_patch": (budget.temporal_patch, vision.temporal_patch_size),
        "position_scheme": (
            contract.position_scheme,
            family_of(config.model_type, origin).position_scheme,
        ),
        "vision_config.hidden_size": (
            getattr(vision, "out_hidden_size", vision.hidden_size),
            config.get_text_config().hidden_size,
        ),
    }
    wrong = [
        f"{name} is {ours!r}, not {theirs!r}"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    ]
    if wrong:
        raise CheckpointError(f"{origin}: does not fit its backbone: {'; '.join(wrong)}")


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
