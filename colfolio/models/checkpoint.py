"""A checkpoint folder as a model: read strictly in any known format, written in our own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from colfolio.data.prompts import IMAGE_TOKEN, VIDEO_TOKEN, Templates
from colfolio.errors import CheckpointError, TensorsError
from colfolio.models import formats
from colfolio.models.contract import PROJECTION, Contract, Source, check_contract, check_saved
from colfolio.models.families import CONFIG_ERRORS, family_of
from colfolio.models.files import CONFIG_FILE, TOKENIZER_FILE
from colfolio.models.hub import Location
from colfolio.models.weights import check_dtypes, listed


def load_parts(
    location: Location, templates: Templates | None = None
) -> tuple[PreTrainedModel, nn.Linear, Tokenizer, Contract]:
    """Backbone, projection, tokenizer and contract of a checkpoint; a hub id's commit is pinned.

    Args:
        templates: for a checkpoint of another library, in place of those that it uses today.

    Raises:
        CheckpointError: a file is missing or damaged, its format is not known, or the tensors are
            not exactly those of the architecture; all missing and unexpected names are listed.
    """
    origin = str(location.folder)
    found = formats.read(location.folder, templates)
    check_contract(found.contract, found.config, origin)
    check_tokenizer(found.tokenizer, found.config, origin)
    backbone, projection = assemble(found.config, found.weights, found.contract.dim, origin)
    contract = check_saved(found.contract, found.weights, origin)
    if location.hub_id is not None:
        here = Source(name=location.hub_id, revision=location.commit)
        updated = {"loaded_from": here, "source": contract.source or here}
        contract = contract.model_copy(update=updated)
    return backbone, projection, found.tokenizer, contract


def assemble(
    config: PretrainedConfig, weights: Mapping[str, Tensor], dim: int, origin: str
) -> tuple[PreTrainedModel, nn.Linear]:
    """Backbone and projection of exactly these weights; nothing is drawn or copied.

    Args:
        weights: by the names of `Retriever.weights`.

    Raises:
        CheckpointError: the configuration fits no model, or the weights are not exactly those of
            the architecture; all missing and unexpected names are listed.
    """
    backbone = empty_backbone(config, origin)
    with torch.device("meta"):
        projection = nn.Linear(hidden_size(config), dim)
    _check_names(backbone, projection, weights, origin)
    check_dtypes(weights, PROJECTION, origin)
    mine = {k.removeprefix(PROJECTION): v for k, v in weights.items() if k.startswith(PROJECTION)}
    rest = {k: v for k, v in weights.items() if not k.startswith(PROJECTION)}
    backbone.load_state_dict(rest, strict=True, assign=True)
    projection.load_state_dict(mine, strict=True, assign=True)
    restore_buffers(backbone)
    return backbone, projection


def empty_backbone(config: PretrainedConfig, origin: str) -> PreTrainedModel:
    """A backbone without weights, on the meta device.

    Raises:
        CheckpointError: no model has this configuration.
    """
    try:
        with torch.device("meta"):
            return family_of(config.model_type, origin).backbone(config)
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{origin}: {CONFIG_FILE} fits no model: {error}") from None


def check_tokenizer(tokenizer: Tokenizer, config: PretrainedConfig, origin: str) -> None:
    """Refuse a tokenizer that is not the backbone's.

    Raises:
        CheckpointError: a token has an id for which the embedding has no row, or visual tokens have
            other ids than the configuration says.
    """
    greatest = max(tokenizer.get_vocab().values(), default=0)
    rows = config.get_text_config().vocab_size
    wrong = [f"it has a token {greatest}, the embedding {rows} rows"] if greatest >= rows else []
    for name, token in (("image_token_id", IMAGE_TOKEN), ("video_token_id", VIDEO_TOKEN)):
        own, told = tokenizer.token_to_id(token), getattr(config, name, None)
        if own is not None and told is not None and own != told:
            wrong.append(f"{token} is {own}, and {name} in {CONFIG_FILE} is {told}")
    if wrong:
        raise CheckpointError(f"{origin}: {TOKENIZER_FILE} is of another model: {'; '.join(wrong)}")


def save_parts(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: PretrainedConfig,
    tokenizer: Tokenizer,
    contract: Contract,
) -> None:
    """Write a checkpoint folder aside and rename it into place.

    Raises:
        CheckpointError: the folder exists and holds something else than a checkpoint, the weights
            cannot be written, or the contract says other dimensions than the projection has.
    """
    rows = len(weights[PROJECTION + "weight"])
    if contract.dim != rows:
        raise CheckpointError(
            f"{folder}: is not written: its contract says vectors of {contract.dim} dimensions, "
            f"and the projection ({PROJECTION}weight) has {rows}; set the retriever's contract"
        )
    found = formats.Found("colfolio", config, dict(weights), tokenizer, contract)
    formats.write_checkpoint(found, folder)


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
    """Cast weights alone: in half precision the inverse frequencies would turn tokens wrongly.

    With an adapter also what it keeps of the base's projection; a checkpoint has all of these.
    """
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _built_again(module: nn.Module) -> nn.Module:
    """A module like this one with its buffers computed."""
    build: Any = type(module)
    if hasattr(module, "config"):
        return build(module.config)
    return build(module.dim, module.theta)  # the vision rotation of transformers before 5.11


def _check_names(
    backbone: nn.Module, projection: nn.Module, weights: Mapping[str, Tensor], origin: str
) -> None:
    expected = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    expected |= {PROJECTION + name: t.shape for name, t in projection.state_dict().items()}
    check_shapes(expected, weights, origin)


def check_shapes(
    expected: Mapping[str, torch.Size], weights: Mapping[str, Tensor], origin: str
) -> None:
    """Refuse weights that are not exactly those of an architecture.

    Raises:
        TensorsError: lists all missing and unexpected names, and those of another shape.
    """
    missing = sorted(set(expected) - set(weights))
    unexpected = sorted(set(weights) - set(expected))
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name])}"
        for name in sorted(set(weights) & set(expected))
        if weights[name].shape != expected[name]
    ]
    if missing or unexpected or shapes:
        raise TensorsError(
            f"{origin}: tensors do not fit the architecture. Missing: {listed(missing)}. "
            f"Unexpected: {listed(unexpected)}. Of another shape: {listed(shapes)}."
        )
