"""A base with its adapter in it, checked against what the adapter says of its base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from colfolio.data.prompts import Templates
from colfolio.errors import CheckpointError, OtherBaseError
from colfolio.models.checkpoint import load_parts
from colfolio.models.contract import Contract, check_contract, hash_weights, on_weights
from colfolio.models.formats import AssumedWarning
from colfolio.models.hub import Location, locate
from colfolio.models.lora.files import Adapter, is_adapter_folder, read_adapter
from colfolio.models.lora.layers import base_weights
from colfolio.models.lora.placing import PROJECTION_NAME, inject, named_modules


def load_adapted_parts(
    path_or_id: str | Path,
    revision: str | None = None,
    templates: Templates | None = None,
    base: str | Path | None = None,
) -> tuple[PreTrainedModel, nn.Module, Tokenizer, Contract]:
    """Backbone, projection, tokenizer and contract of a checkpoint, or of an adapter in its base.

    Args:
        templates: as of `load_parts`; of an adapter, if it has no contract.
        base: of an adapter; None takes the one that it names.

    Raises:
        CheckpointError: as `load_parts`, for either folder; the adapter is of another base, or its
            base cannot be found.
    """
    location = locate(path_or_id, revision)
    if not is_adapter_folder(location.folder):
        if base is not None:
            raise CheckpointError(f"{path_or_id}: is a whole model, which has no base; give none")
        return load_parts(location, templates)
    adapter = read_adapter(location.folder)
    if adapter.contract is not None and templates not in (None, adapter.contract.templates):
        raise CheckpointError(
            f"{adapter.folder}: its contract says the templates, and others were given; an adapter "
            "is used as it was trained, so give none"
        )
    given = templates if adapter.contract is None else None
    backbone, projection, tokenizer, own = load_parts(base_of(adapter, base), given)
    projection, contract = put_in(adapter, backbone, projection, own)
    return backbone, projection, tokenizer, contract


def put_in(
    adapter: Adapter,
    backbone: Any,
    projection: nn.Module,
    own: Contract,
    weights_hash: str | None = None,
) -> tuple[nn.Module, Contract]:
    """Put an adapter into a base; returns the projection and the contract that then hold.

    Args:
        own: contract of the base.
        weights_hash: of the base's weights as they were read; None takes that of these.

    Raises:
        OtherBaseError: the adapter was trained on other weights.
        CheckpointError: it does not fit these.
    """
    root = named_modules(backbone, projection)
    plan = adapter.plan(root)
    found = weights_hash or hash_weights(base_weights(root.state_dict()))
    contract = adapter.contract
    if contract is None:
        told = (
            f"{adapter.folder.name} names no hash of its base and no templates: those of the base "
            f"that was opened are taken (weights {found[:12]})"
        )
        warnings.warn(told, AssumedWarning, stacklevel=4)
        own = own.model_copy(update={"assumed": (*own.assumed, told)})
        contract = on_weights(own, own, found)
    check_contract(contract, backbone.config, str(adapter.folder))
    if contract.base_hash != found:
        raise OtherBaseError(
            f"{adapter.folder}: is an adapter of other weights: its base has base_hash "
            f"{contract.base_hash}, the weights here have {found}; give the base that it was "
            "trained on, in the dtype it has there"
        )
    inject(root, plan, adapter.weights)
    return root.get_submodule(PROJECTION_NAME), on_weights(contract, own, found)


def base_of(
    adapter: Adapter, given: str | Path | None = None, *, with_weights: bool = True
) -> Location:
    """Where an adapter's base is.

    Args:
        given: in place of the one that it names.
        with_weights: as of `locate`.

    Raises:
        CheckpointError: it names none, or one that cannot be opened or is an adapter itself.
    """
    name = given if given is not None else adapter.config.base_model_name_or_path
    advice = (
        "name its place as base_model_name_or_path in adapter_config.json, or give it: "
        "`colfolio export --base`, Retriever.from_pretrained(adapter, base=...)"
    )
    if name is None:
        raise CheckpointError(f"{adapter.folder}: names no base; {advice}")
    beside = adapter.folder / name
    revision = None
    if given is None and beside.is_dir():
        name = beside
    elif given is None:
        revision = adapter.config.revision
    try:
        location = locate(name, revision, with_weights=with_weights)
    except CheckpointError as error:
        raise CheckpointError(
            f"{adapter.folder}: its base cannot be opened: {error}; {advice}"
        ) from None
    if is_adapter_folder(location.folder):
        raise CheckpointError(
            f"{adapter.folder}: its base {name} is an adapter too; merge that one first"
        )
    return location
