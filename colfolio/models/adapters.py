"""Low-rank adapters of a retriever: added, saved, loaded, merged, and taken away again.

peft's layers do the work inside the model; names and folders are those that colpali-engine and peft
read. An adapter is tied to its base by the hash of the base's weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from colfolio.errors import CheckpointError, ColfolioError
from colfolio.models.checkpoint import check_shapes
from colfolio.models.contract import Contract, on_weights
from colfolio.models.lora.files import is_adapter_folder, read_adapter, write_adapter
from colfolio.models.lora.layers import (
    drop_all,
    fold_all,
    fold_some,
    is_adapted,
    merge_all,
    unmerge_all,
)
from colfolio.models.lora.opening import put_in
from colfolio.models.lora.placing import (
    PROJECTION_NAME,
    LoraPlan,
    LoraSettings,
    adapter_weights,
    first_weights,
    inject,
    lora_layers,
    named_modules,
    plan_in,
    plan_of,
    shapes_of,
)
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.retriever import Retriever

__all__ = [
    "LoraPlan",
    "LoraSettings",
    "adapter_in",
    "add_lora",
    "base_hash_of",
    "has_adapter",
    "is_adapter_folder",
    "load_adapter",
    "merge",
    "merge_layers",
    "put_adapter",
    "remove",
    "save_adapter",
    "unmerge",
]


def add_lora(retriever: ProjectedBackbone, settings: LoraSettings, seed: int) -> None:
    """Put fresh adapters into a retriever, in place; no vector changes by it.

    All else is frozen, except a projection that is trained wholly.

    Args:
        seed: of the matrices A; B is zero. Equal seeds give equal weights on every machine.

    Raises:
        ColfolioError: peft is missing, or the retriever has an adapter.
        RecipeError: a name of the settings is of no linear layer.
    """
    _refuse_second(retriever)
    root = _root(retriever)
    plan = plan_of(root, settings)
    weights = first_weights(root, plan, seed)
    inject(root, plan, weights)
    _take_over(retriever, root)


def adapter_in(retriever: ProjectedBackbone) -> tuple[LoraPlan, dict[str, Tensor]] | None:
    """The adapter at work in a model, as `put_adapter` takes it; None if there is none."""
    root = _root(retriever)
    if next(lora_layers(root), None) is None:
        return None
    return plan_in(root), adapter_weights(root)


def put_adapter(
    retriever: ProjectedBackbone, plan: LoraPlan, weights: Mapping[str, Tensor], origin: str
) -> None:
    """Put adapters with these tensors into a model, in place; what they are not is frozen.

    Args:
        origin: named in errors.

    Raises:
        ColfolioError: peft is missing, or the model has an adapter.
        CheckpointError: the tensors are not exactly those of the plan.
    """
    _refuse_second(retriever)
    root = _root(retriever)
    shapes = {name: torch.Size(shape) for name, shape in shapes_of(root, plan).items()}
    check_shapes(shapes, weights, origin)
    inject(root, plan, weights)
    _take_over(retriever, root)


def has_adapter(retriever: ProjectedBackbone) -> bool:
    """Whether there is an adapter, at work or merged so that it can be set apart again."""
    return is_adapted(_root(retriever))


def merge(retriever: ProjectedBackbone, *, keeps_adapter: bool = False) -> None:
    """Let one product compute what a layer and its adapter do, in place.

    `W + scale * B A` is summed in float32 at least, and rounded once to the dtype of W.

    Args:
        keeps_adapter: for `unmerge`; then the adapted layers are in memory twice. Without, the
            plain layers alone are left, all of which train, as in a model just loaded.

    Raises:
        ColfolioError: there is no adapter, or it is merged.
    """
    _change(retriever, merge_all if keeps_adapter else fold_all, needs_open=True)
    if not keeps_adapter:
        retriever.requires_grad_(True)


def merge_layers(retriever: ProjectedBackbone, names: Collection[str]) -> None:
    """Fold the adapters of some layers into the layers' weights, in place and for good.

    Weights stay the parameters that they were, and train or not as before. With the last adapter a
    projection that is trained wholly becomes a plain layer.

    Args:
        names: of adapted layers, as in a checkpoint; others are passed over.
    """
    if names:
        root = _root(retriever)
        fold_some(root, names)
        _take_over(retriever, root)


def unmerge(retriever: ProjectedBackbone) -> None:
    """Set adapters that `merge` kept apart again; all weights are what they were, to the bit.

    Raises:
        ColfolioError: nothing is merged, or the adapter was not kept.
    """
    root = _root(retriever)
    if not unmerge_all(root):
        raise ColfolioError(
            "nothing to set apart: merge(retriever, keeps_adapter=True) comes first"
        )
    _take_over(retriever, root)


def remove(retriever: Retriever) -> None:
    """Take the adapter away: the weights are the base's, to the bit; the contract stays.

    All of them train, as in a model just loaded.

    Raises:
        ColfolioError: there is no adapter.
    """
    _change(retriever, drop_all, needs_open=False)
    retriever.requires_grad_(True)


def save_adapter(
    retriever: Retriever,
    folder: str | Path,
    base: str,
    revision: str | None = None,
    *,
    base_hash: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter alone, with the contract and the hash of its base.

    Args:
        base: hub id or folder of the base; a relative folder is looked for from the adapter's.
        revision: of a hub id.
        base_hash: of the base's weights as its folder has them, if those here are of another dtype.
        weights: those of `adapter_in`, put together by the caller if they are spread over ranks.

    Raises:
        ColfolioError: there is no adapter, or it is merged; or no hash is given, and the one of the
            base's folder is not known.
        CheckpointError: the folder holds something else than an adapter, or cannot be written.
    """
    root = _root(retriever)
    _check_open(root)
    found = base_hash or base_hash_of(retriever)
    contract = on_weights(retriever.contract, retriever.contract, found)
    write_adapter(root, contract, Path(folder), base, revision, weights)


def base_hash_of(retriever: Retriever) -> str:
    """The hash by which an adapter names the base that a retriever is, as its folder has it.

    Raises:
        ColfolioError: it is not known, because the weights were cast since they were read.
    """
    found = retriever.weights_hash()
    if found is None:
        raise ColfolioError(
            "the weights were cast since they were read, so the hash by which an adapter names its "
            "base is not known; cast by Retriever.from_pretrained(base, dtype=...), or save the "
            "base as it is now and open that"
        )
    return found


def load_adapter(retriever: Retriever, folder: str | Path) -> None:
    """Put the adapter of a folder into a retriever, in place; strict, and on its own base alone.

    `Retriever.from_pretrained` opens such a folder with its base.

    Raises:
        ColfolioError: peft is missing, or the retriever has an adapter.
        CheckpointError: the folder is damaged, was trained on other weights or with another
            contract, or asks for what is not honoured here; the retriever is as it was.
    """
    _refuse_second(retriever)
    adapter = read_adapter(Path(folder))
    if adapter.contract is not None:
        _check_same_use(adapter.contract, retriever.contract, adapter.folder)
    projection, contract = put_in(
        adapter,
        retriever.backbone,
        retriever.projection,
        retriever.contract,
        retriever.weights_hash(),
    )
    retriever.projection, retriever.contract = projection, contract


def _root(retriever: ProjectedBackbone) -> nn.Module:
    return named_modules(retriever.backbone, retriever.projection)


def _take_over(retriever: ProjectedBackbone, root: nn.Module) -> None:
    """The projection is the one module that another object holds."""
    retriever.projection = root.get_submodule(PROJECTION_NAME)


def _change(
    retriever: ProjectedBackbone, change: Callable[[nn.Module], None], *, needs_open: bool
) -> None:
    root = _root(retriever)
    if needs_open or not is_adapted(root):
        _check_open(root)
    change(root)
    _take_over(retriever, root)


def _check_open(root: nn.Module) -> None:
    if not is_adapted(root):
        raise ColfolioError("the retriever has no adapter: add_lora or load_adapter comes first")
    if next(lora_layers(root), None) is None:
        raise ColfolioError("the adapter is merged: unmerge(retriever) comes first")


def _refuse_second(retriever: ProjectedBackbone) -> None:
    if has_adapter(retriever):
        raise ColfolioError("the retriever has an adapter: merge it, or remove it")


def _check_same_use(theirs: Contract, ours: Contract, folder: Path) -> None:
    """Refuse an adapter that was trained on other inputs than those which the retriever makes."""
    mine, its = json.loads(ours.deciding()), json.loads(theirs.deciding())
    other = [f"{name} {its[name]!r}, not {mine[name]!r}" for name in its if its[name] != mine[name]]
    if other:
        raise CheckpointError(
            f"{folder}: was trained with another contract than the retriever's: {'; '.join(other)};"
            " Retriever.from_pretrained(adapter, base=...) takes that of the adapter"
        )
