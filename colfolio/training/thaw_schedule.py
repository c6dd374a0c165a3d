"""When stages open: refused where they cannot, told before the first step, asked before each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from colfolio.errors import RecipeError
from colfolio.models.adapters import has_adapter
from colfolio.models.parts import inventory
from colfolio.models.projected import ProjectedBackbone
from colfolio.training.state import TrainSettings
from colfolio.training.thaw import Opening, ThawStage, openings, trained_names
from colfolio.training.thaw_signals import Watch


def check_schedule(
    stages: Sequence[ThawStage], window: int, steps: int, steps_an_epoch: float | None = None
) -> None:
    """Refuse stages that would open after the run, or before one that stands before them.

    Args:
        window: steps of a window of `margin_flat`.
        steps: of the run.
        steps_an_epoch: None if that is not known yet; epochs are then compared with epochs alone.

    Raises:
        RecipeError: names the stage.
    """
    before, epoch = 0, 0.0  # the earliest that the stage before can open
    for number, stage in enumerate(stages):
        key = f"thaw.{number}.{stage.start}"
        least = earliest_step(stage, before, window, steps_an_epoch)
        if stage.epoch is not None:
            _refuse_past("epoch", stage.epoch, epoch, key)
            epoch = stage.epoch
        _refuse_past("step", least, before, key)
        if least >= steps:
            raise RecipeError(
                f"it opens at step {least} at the earliest, and the run ends with {steps} steps, "
                "counted from 0; let it open sooner, or leave the stage out",
                key,
            )
        before = least


def earliest_step(
    stage: ThawStage, before: int, window: int, steps_an_epoch: float | None = None
) -> int:
    """The first step with which a stage can open.

    Args:
        before: that of the stage before, from which signals count.
        window: steps of a window of `margin_flat`.
        steps_an_epoch: None if that is not known yet.
    """
    if stage.step is not None:
        return stage.step
    if stage.epoch is not None:
        return before if steps_an_epoch is None else math.ceil(stage.epoch * steps_an_epoch)
    if stage.margin_flat is not None:
        return before + window * (stage.margin_flat + 1)
    assert stage.at_chance is not None
    return before + stage.at_chance


def most_windows(stages: Sequence[ThawStage]) -> int:
    """Over how many windows the margin has to be flat for a stage, at most; 0 if for none."""
    return max((stage.margin_flat or 0 for stage in stages), default=0)


def is_due(stage: ThawStage, step: int, epoch: float, watch: Watch) -> bool:
    """Whether the next of the stages opens now.

    Args:
        step: how many are done.
        epoch: how often the data were gone through, with its fraction.
    """
    if stage.step is not None:
        return step >= stage.step
    if stage.epoch is not None:
        return epoch >= stage.epoch
    if stage.margin_flat is not None:
        return watch.is_flat(stage.margin_flat)
    assert stage.at_chance is not None
    return watch.at_chance >= stage.at_chance


def trains_line(model: ProjectedBackbone, settings: TrainSettings, opened: int = 0) -> str:
    """What trains now and what later stages add, in one sentence.

    Args:
        opened: how many stages have opened.
    """
    found, stages = inventory(model), settings.thaw[opened:]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    now = trained_names(model)
    trained, total = sum(sizes[name] for name in now), sum(sizes.values())
    head = (
        f"{found.label(now)} ({_count(trained)} of {_count(total)}, {100 * trained / total:.3g} %)"
    )
    if settings.lora is None and has_adapter(model):
        head += ", for the model came with an adapter, and the weights of its base are frozen"
    both = zip(stages, openings(model, stages), strict=True)
    later = (_later(stage, opening, settings.thaw_window) for stage, opening in both)
    return "; ".join([head, *later])


def _refuse_past(unit: str, said: int | float, before: int | float, key: str) -> None:
    if said < before:
        raise RecipeError(
            f"{unit} {said} is past when the stage opens, for the one before it opens at {unit} "
            f"{before} at the earliest; write stages in the order in which they open",
            key,
        )


def _later(stage: ThawStage, opening: Opening, window: int) -> str:
    merged = ", adapters merged" if opening.leaving else ""
    return f"{_when(stage, window)} also {opening.label}{merged}"


def _when(stage: ThawStage, window: int) -> str:
    if stage.step is not None:
        return f"at step {stage.step:,}"
    if stage.epoch is not None:
        return f"from epoch {stage.epoch:g} on"
    if stage.margin_flat is not None:
        return f"once the margin is flat for {stage.margin_flat} windows of {window} steps"
    return f"once the loss is at chance for {stage.at_chance} steps"


def _count(number: int) -> str:
    """Of parameters, with three digits.

    >>> [_count(number) for number in (950, 12_345_678, 2_210_000_000)]
    ['950', '12.3 M', '2.21 B']
    """
    for size, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return str(number)
