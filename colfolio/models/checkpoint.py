"""A checkpoint folder: weights, configuration, tokenizer, contract; read strictly."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from colfolio.errors import CheckpointError
from colfolio.models.contract import Contract, check_contract, load_contract, save_contract
from colfolio.models.families import CONFIG_ERRORS, family_of
from colfolio.models.hub import local_folder
from colfolio.models.weights import WEIGHTS_FILE, read_weights, write_weights

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
PROJECTION = "custom_text_proj."


def load_parts(
    path_or_id: str | Path, revision: str | None = None
) -> tuple[PreTrainedModel, nn.Linear, Tokenizer, Contract]:
    """Backbone, projection, tokenizer and contract of a checkpoint folder or hub id.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors are not exactly those of the
            architecture; all missing and unexpected names are listed.
    """
    folder = local_folder(path_or_id, revision)
    contract = load_contract(folder)
    config = load_config(folder)
    check_contract(contract, config, str(folder))
    weights = read_weights(folder)
    with torch.device("meta"):
        try:
            backbone = family_of(config.model_type, str(folder)).backbone(config)
        except CONFIG_ERRORS as error:
            raise CheckpointError(f"{folder / CONFIG_FILE}: fits no model: {error}") from None
        projection = nn.Linear(hidden_size(config), contract.dim)
    _check_names(backbone, projection, weights, folder)
    mine = {k.removeprefix(PROJECTION): v for k, v in weights.items() if k.startswith(PROJECTION)}
    rest = {k: v for k, v in weights.items() if not k.startswith(PROJECTION)}
    backbone.load_state_dict(rest, strict=True, assign=True)
    projection.load_state_dict(mine, strict=True, assign=True)
    restore_buffers(backbone)
    return backbone, projection, load_tokenizer(folder), contract


def save_parts(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: PretrainedConfig,
    tokenizer: Tokenizer,
    contract: Contract,
) -> None:
    """Write a checkpoint folder aside and rename it into place.

    Raises:
        CheckpointError: the folder exists and holds something else than a checkpoint, or the
            weights cannot be written.
    """
    is_folder = folder.is_dir() or not folder.exists()
    is_free = is_folder and not (folder.exists() and any(folder.iterdir()))
    if not is_free and not (folder / CONFIG_FILE).exists():
        raise CheckpointError(f"{folder}: exists and is no checkpoint; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        write_weights(plain, aside / WEIGHTS_FILE)
        values = config.to_dict() | {"architectures": ["ColQwen2"]}
        values.pop("_attn_implementation", None)
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (aside / CONFIG_FILE).write_text(text, encoding="utf-8")
        text = tokenizer.to_str(pretty=True)  # its own `save` raises bare Exception
        (aside / TOKENIZER_FILE).write_text(text, encoding="utf-8")
        save_contract(contract, aside)
        _swap(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_config(folder: Path) -> PretrainedConfig:
    """The backbone's configuration in a folder."""
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = family_of(values.get("model_type"), str(path)).config.from_dict(values)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}, so this is no checkpoint") from None
    except CheckpointError:
        raise
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    config.dtype = None
    return config


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder, by its `tokenizer.json`."""
    path = folder / TOKENIZER_FILE
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {TOKENIZER_FILE}") from None
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def hidden_size(config: PretrainedConfig) -> int:
    """Width of the text decoder."""
    return config.get_text_config().hidden_size


def restore_buffers(backbone: PreTrainedModel) -> None:
    """Compute again the buffers that no checkpoint holds (inverse frequencies of the rotations)."""
    for module in backbone.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            fresh = _built_again(module)
            for name, buffer in fresh.named_buffers(recurse=False):
                module.register_buffer(name, buffer, persistent=False)
    left = [name for name, tensor in backbone.state_dict(keep_vars=True).items() if tensor.is_meta]
    left += [name for name, buffer in backbone.named_buffers() if buffer.is_meta]
    assert not left, f"tensors without values: {left}"


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast weights alone: in half precision the inverse frequencies would turn tokens wrongly."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def _built_again(module: nn.Module) -> nn.Module:
    """A module like this one with its buffers computed."""
    build: Any = type(module)
    if hasattr(module, "config"):
        return build(module.config)
    return build(module.dim, module.theta)  # the vision rotation of transformers before 5.11


def _check_names(
    backbone: nn.Module, projection: nn.Module, weights: Mapping[str, Tensor], folder: Path
) -> None:
    expected = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    expected |= {PROJECTION + name: t.shape for name, t in projection.state_dict().items()}
    missing = sorted(set(expected) - set(weights))
    unexpected = sorted(set(weights) - set(expected))
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name])}"
        for name in sorted(set(weights) & set(expected))
        if weights[name].shape != expected[name]
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(
            f"{folder}: tensors do not fit the architecture. Missing: {_listed(missing)}. "
            f"Unexpected: {_listed(unexpected)}. Of another shape: {_listed(shapes)}."
        )


def _listed(names: list[str]) -> str:
    return (
        ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        or "none"
    )


def _swap(aside: Path, folder: Path) -> None:
    """Put a finished folder in the place of another; at no moment is there none for long."""
    if folder.exists():
        old = aside.with_name(aside.name + ".old")
        folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old)
    else:
        aside.rename(folder)
