"""When stages open: refused where they cannot, told before the first step, asked before each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from colfolio.errors import RecipeError
from colfolio.models.parts import inventory
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
    least, epoch = 0, 0.0  # the earliest that the stage before can open
    for number, stage in enumerate(stages):
        key, said = f"thaw.{number}", 0
        if stage.step is not None:
            key, said = f"{key}.step", stage.step
        elif stage.epoch is not None:
            key = f"{key}.epoch"
            said = _step_of_epoch(stage.epoch, steps_an_epoch, least)
            if stage.epoch < epoch:
                raise RecipeError(
                    f"{stage.epoch:g} is past when the stage opens, for the one before it opens at "
                    f"epoch {epoch:g}; write stages in the order in which they open",
                    key,
                )
            epoch = stage.epoch
        else:
            wait, name = _least_wait(stage, window)
            key, said = f"{key}.{name}", least + wait
        if said < least:
            raise RecipeError(
                f"step {said} is past when the stage opens, for the one before it opens at step "
                f"{least} at the earliest; write stages in the order in which they open",
                key,
            )
        if said >= steps:
            raise RecipeError(
                f"it opens at step {said} at the earliest, and the run ends with {steps} steps, "
                "counted from 0; let it open sooner, or leave the stage out",
                key,
            )
        least = said


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
        return watch.flat >= stage.margin_flat
    assert stage.at_chance is not None
    return watch.at_chance >= stage.at_chance


def trains_line(retriever: Any, stages: Sequence[ThawStage], window: int) -> str:
    """What trains now and what later stages add, in one sentence.

    Args:
        stages: that have not opened yet.
        window: steps of a window of `margin_flat`.
    """
    found = inventory(retriever)
    sizes = {name: parameter.numel() for name, parameter in retriever.named_parameters()}
    now = trained_names(retriever)
    trained, total = sum(sizes[name] for name in now), sum(sizes.values())
    head = (
        f"{found.label(now)} ({_count(trained)} of {_count(total)}, {100 * trained / total:.3g} %)"
    )
    both = zip(stages, openings(retriever, stages), strict=True)
    return "; ".join([head, *(_later(stage, opening, window) for stage, opening in both)])


def _step_of_epoch(epoch: float, steps_an_epoch: float | None, least: int) -> int:
    return least if steps_an_epoch is None else math.ceil(epoch * steps_an_epoch)


def _least_wait(stage: ThawStage, window: int) -> tuple[int, str]:
    """Steps before a signal can come, and its name; the first window is what others grow from."""
    if stage.margin_flat is not None:
        return window * (stage.margin_flat + 1), "margin_flat"
    assert stage.at_chance is not None
    return stage.at_chance, "at_chance"


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
