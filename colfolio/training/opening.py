"""Stages of a run as they open: adapters merged, parameters added, moments of the others kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from colfolio.models.parts import inventory
from colfolio.training.optim import ParameterGroup, build_optimiser
from colfolio.training.start import equip
from colfolio.training.state import TrainingState
from colfolio.training.thaw import Opening, ThawStage, open_parts, openings, stage_groups
from colfolio.training.thaw_schedule import is_due
from colfolio.training.thaw_signals import Watch
from colfolio.training.unsharding import put_together


def open_due_stages(state: TrainingState, epoch: float) -> list[str]:
    """Open the stages whose time has come; returns what began to train, all ranks the same.

    To be called before each step. A model that is spread over ranks is then another object.

    Args:
        epoch: how often the data were gone through, with its fraction.
    """
    opened: list[str] = []
    stages = state.settings.thaw
    while len(state.opened) < len(stages):
        number = len(state.opened)
        due = is_due(stages[number], state.step, epoch, state.watch)
        # unlike machines may round a signal unlike: the main rank's word holds
        if not state.world.gather_counts(int(due))[0]:
            break
        opening = openings(state.model, [stages[number]], number)[0]
        _open(state, stages[number], opening)
        opened.append(opening.label)
    return opened


def bottom_opening(state: TrainingState) -> tuple[str, int] | None:
    """What opened together with the lowest layer, and with which step; None if that is frozen.

    Where a run keeps features, the lowest layer is frozen in its beginning.
    """
    found = inventory(state.model)
    steps = [
        group.opened
        for group in state.groups
        if any(found.places[name].depth == 0 for name in group.names)
    ]
    if not steps:
        return None
    together = [group.names for group in state.groups if group.opened == min(steps)]
    return found.label([name for names in together for name in names]), min(steps)


def _open(state: TrainingState, stage: ThawStage, opening: Opening) -> None:
    settings, moments = state.settings, _moments(state)
    if state.blank is not None:
        state.model = put_together(state.model, state.blank)
    names = open_parts(state.model, opening)
    added = stage_groups(state.model, names, stage, state.step, settings.optimiser)
    state.groups = [*_without(state.groups, opening.leaving), *added]
    cache = state.exact.cache
    state.exact, state.blank = equip(state.model, settings, state.kernel, state.world, cache)
    state.optimiser = build_optimiser(state.model, settings.optimiser, state.groups)
    named = dict(state.model.named_parameters())
    for name, values in moments.items():
        if name in named:
            state.optimiser.state[named[name]] = values
    state.opened.append(state.step)
    state.watch = Watch()


def _moments(state: TrainingState) -> dict[str, Any]:
    """What the optimiser keeps of each parameter, in the order in which it began to."""
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    return {names[id(parameter)]: values for parameter, values in state.optimiser.state.items()}


def _without(groups: Sequence[ParameterGroup], leaving: frozenset[str]) -> list[ParameterGroup]:
    """The groups without some parameters; one that has no others goes."""
    left = [
        replace(group, names=tuple(name for name in group.names if name not in leaving))
        for group in groups
    ]
    return [group for group in left if group.names]
