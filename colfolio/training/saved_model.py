"""The model that a run has made, as a folder that opens by itself: whole, or an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from colfolio.distributed import gather_state
from colfolio.models.adapters import adapter_in, merge, save_adapter, unmerge
from colfolio.models.parts import inventory
from colfolio.training.state import TrainingState
from colfolio.training.thaw import trained_names


def save_model(
    state: TrainingState,
    folder: Path,
    *,
    base: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Save the model alone, as its `save_pretrained` does; all ranks call it.

    A retriever that still has its adapters, over weights that are its base's, is saved as an
    adapter. Where other weights trained too, those folders would be as large as the model, so the
    adapters that are left are merged into what is saved; so are those of a generator, and adapters
    that the run began with, whose base is not the folder it began with.

    Args:
        base: folder or hub id of what was trained; None merges adapters in any case.
        recipe, data, metrics: what the model's contract tells of its training; see `Contract`.

    Raises:
        CheckpointError: it cannot be written.
    """
    told = {"recipe": recipe, "data": dict(data or {}), "metrics": dict(metrics or {})}
    model: Any = state.model  # the contract's class is that of its model
    model.contract = model.contract.model_copy(update=told)
    adapter = adapter_in(model)
    if adapter and base is not None and _has_base(state):
        weights = gather_state(adapter[1])
        if state.world.is_main:
            _save_adapter(state, folder, base, weights)
    else:
        weights = _merged(model) if adapter else gather_state(model.weights())
        if state.world.is_main:
            model.save_pretrained(folder, weights)
    state.world.barrier()


def _has_base(state: TrainingState) -> bool:
    """Whether the run put adapters on its base, and all that trains is kept beside its weights."""
    if not state.base_hash:
        return False
    places, adapter = inventory(state.model).places, adapter_in(state.model)
    beside = (
        {"adapters", "projection"} if adapter and adapter[0].trains_projection else {"adapters"}
    )
    return all(places[name].part in beside for name in trained_names(state.model))


def _save_adapter(
    state: TrainingState, folder: Path, base: str, weights: Mapping[str, Tensor]
) -> None:
    source = state.retriever.contract.loaded_from
    revision = source.revision if source and source.name == base else None
    save_adapter(
        state.retriever, folder, base, revision, base_hash=state.base_hash, weights=weights
    )


def _merged(model: Any) -> dict[str, Tensor]:
    """All weights with the adapters in them, on the main rank; the model is as it was, after it."""
    merge(model, keeps_adapter=True)
    try:
        return gather_state(model.weights())
    finally:
        unmerge(model)
