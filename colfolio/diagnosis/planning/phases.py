"""The phases of a run: between two openings of its stages the same parameters train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colfolio.models.generator import Generator
from colfolio.models.retriever import Retriever
from colfolio.training import TrainSettings
from colfolio.training.thaw import ThawStage, open_parts, openings, trained_names
from colfolio.training.thaw_schedule import earliest_step
from colfolio.training.unsharding import blank_copy


@dataclass(frozen=True, slots=True)
class Phase:
    """A model as it trains from one opening to the next.

    Args:
        name: the stage that opens it, as errors call it; empty in the beginning of a run.
        first: its first step; where a signal decides, the first that it can be.
        is_exact: no signal decides, nor an epoch of unknown length.
        share: of the steps of the run.
        model: on the meta device, but in the beginning.
    """

    name: str
    first: int
    is_exact: bool
    share: float
    model: Retriever | Generator


def phases_of(
    model: Retriever | Generator, settings: TrainSettings, epochs: float | None
) -> list[Phase]:
    """All phases of a run in which something trains; the model is left as it is.

    Args:
        model: with what is frozen in the beginning frozen.
        epochs: of the run; None if an epoch's length is not known.
    """
    firsts = _firsts(settings, epochs)
    lasts = [*firsts[1:], settings.steps]
    phases = [Phase("", 0, is_exact=True, share=lasts[0] / settings.steps, model=model)]
    for number, stage in enumerate(settings.thaw):
        model = blank_copy(model)
        open_parts(model, openings(model, [stage], number)[0])
        first, last = firsts[number + 1], lasts[number + 1]
        is_exact = phases[-1].is_exact and _is_exact(stage, epochs)
        share = (last - first) / settings.steps
        phases.append(Phase(f"thaw.{number}", first, is_exact, share, model))
    return [phase for phase in phases if trained_names(phase.model)]


def _firsts(settings: TrainSettings, epochs: float | None) -> Sequence[int]:
    """The first step of each phase, or the first that it can be."""
    steps_an_epoch = settings.steps / epochs if epochs else None
    firsts = [0]
    for stage in settings.thaw:
        step = earliest_step(stage, firsts[-1], settings.thaw_window, steps_an_epoch)
        firsts.append(min(step, settings.steps))
    return firsts


def _is_exact(stage: ThawStage, epochs: float | None) -> bool:
    return stage.step is not None or (stage.epoch is not None and epochs is not None)
