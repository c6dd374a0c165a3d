"""The evidence, read: means over the last steps, shares of the way, changes since the beginning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from colfolio.diagnosis.causes.thresholds import (
    AT_CHANCE,
    BETTER_RANKED,
    GAINED,
    GONE_SPREAD,
    LEARNT,
    RANKED,
    SILENT,
    SLIGHT,
    STARTED,
)
from colfolio.diagnosis.evidence import Evidence, ProbeSignals
from colfolio.diagnosis.training_log import LoggedStep

_MOST_RECENT = 50
_MOST_FIRST = 10
_FEWEST = 10  # rows of a log that may have one for every ten steps
_DEVIATIONS = 2.0
_LARGEST = 5  # steps


@dataclass(frozen=True, slots=True)
class Level:
    """A loss over some steps, beside its chance level and its floor."""

    loss: float
    error: float
    chance: float
    floor: float

    @property
    def way(self) -> float:
        """Share of the way from chance, 0, to floor, 1; negative above chance."""
        return (self.chance - self.loss) / max(self.chance - self.floor, 1e-9)


class Reading:
    """Numbers that several causes ask for, each computed once."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.settled = evidence.settled
        self.steps = [step for step in evidence.steps if math.isfinite(step.loss)]

    @cached_property
    def num_recent(self) -> int:
        """Steps that count as the last ones."""
        return max(1, min(_MOST_RECENT, len(self.steps) // 5))

    @cached_property
    def recent(self) -> Level | None:
        """The loss of the last steps; None without steps, or where chance is not known."""
        return self.level(self.steps[-self.num_recent :]) if self.steps else None

    @cached_property
    def before(self) -> Level | None:
        """The loss of as many steps half the run ago."""
        middle = len(self.steps) // 2
        chosen = self.steps[max(0, middle - self.num_recent) : middle]
        return self.level(chosen) if chosen else None

    @cached_property
    def beginning(self) -> Level | None:
        """The loss of the first steps."""
        return self.level(self.steps[: min(_MOST_FIRST, self.num_recent)])

    def level(self, steps: Sequence[LoggedStep]) -> Level | None:
        """The mean loss of some steps."""
        chances = [step.chance for step in steps if step.chance is not None]
        if not chances:
            return None
        losses = [step.loss for step in steps]
        mean = math.fsum(losses) / len(losses)
        spread = math.fsum((loss - mean) ** 2 for loss in losses) / max(1, len(losses) - 1)
        floors = [step.floor or 0.0 for step in steps]
        return Level(
            mean,
            math.sqrt(spread / len(losses)),
            math.fsum(chances) / len(chances),
            math.fsum(floors) / len(floors),
        )

    @cached_property
    def is_at_chance(self) -> bool:
        """Whether the last losses are no better than chance, by more than their noise."""
        level = self.recent
        if level is None:
            return False
        width = max(level.chance - level.floor, 1e-9)
        return level.way < AT_CHANCE + _DEVIATIONS * level.error / width

    @cached_property
    def is_poor(self) -> bool:
        """Whether the model has hardly learnt, judged by the last losses and by what it ranks."""
        is_high = self.is_at_chance or (self.recent is not None and self.recent.way < STARTED)
        return is_high and not self.ranks(RANKED)

    def ranks(self, share: float) -> bool:
        """Whether so many queries rank their answer first: of the probe's documents, or a batch's.

        A loss that its temperature holds up says less than that.
        """
        found = self.accuracy if self.last_probe is None else self.last_probe.accuracy
        return found is not None and found >= share

    @cached_property
    def is_falling(self) -> bool:
        """Whether the loss is lower than half the run ago, by more than its noise."""
        now, before = self.recent, self.before
        if now is None or before is None:
            return False
        noise = math.hypot(now.error, before.error)
        return now.way - before.way > _DEVIATIONS * noise / max(now.chance - now.floor, 1e-9)

    @cached_property
    def gain(self) -> float | None:
        """Share of the way that the loss has come since the first steps, or lost if negative.

        A loss above chance has no way behind it. The probe says it without the noise of batches.
        """
        first, last, now = self.first_probe, self.last_probe, self.recent
        if first is not None and last is not None:
            return max(0.0, _way(last)) - max(0.0, _way(first))
        if now is None or self.beginning is None:
            return None
        return max(0.0, now.way) - max(0.0, self.beginning.way)

    @cached_property
    def gain_noise(self) -> float:
        """What the gain may be by the noise of batches alone."""
        now, begun = self.recent, self.beginning
        if now is None or begun is None or (self.first_probe and self.last_probe):
            return 0.0
        noise = math.hypot(now.error, begun.error)
        return _DEVIATIONS * noise / max(now.chance - now.floor, 1e-9)

    @cached_property
    def has_gained(self) -> bool:
        """Whether the loss is clearly lower than in the first steps, or more answers rank first."""
        if self.gain is None:
            return False
        first, last = self.first_probe, self.last_probe
        if first and last and last.accuracy - first.accuracy > BETTER_RANKED:
            return True
        return self.gain > GAINED + self.gain_noise

    @cached_property
    def has_learnt(self) -> bool:
        """The same, or whether a loss that falls has fallen a little already."""
        if self.has_gained or self.gain is None:
            return self.has_gained
        return self.is_falling and self.gain > max(SLIGHT, self.gain_noise)

    @cached_property
    def was_good(self) -> bool:
        """Whether the model could rank before the first step; a log of losses does not say it."""
        first = self.first_probe
        if first is not None:
            return first.accuracy >= RANKED or _way(first) > LEARNT
        begun = self.beginning
        return self.accuracy is not None and begun is not None and begun.way > LEARNT

    @cached_property
    def first_probe(self) -> ProbeSignals | None:
        """Before the first step; None if that was not measured."""
        probes = self.evidence.probes
        return probes[0] if probes and probes[0].step == 0 else None

    @cached_property
    def last_probe(self) -> ProbeSignals | None:
        """The newest, if the model has trained since the first."""
        probes = self.evidence.probes
        return probes[-1] if probes and probes[-1].step > 0 else None

    @cached_property
    def spread_left(self) -> float | None:
        """Spread of scores over that before the first step."""
        if self.first_probe is None or self.last_probe is None or not self.first_probe.spread:
            return None
        return self.last_probe.spread / self.first_probe.spread

    @cached_property
    def has_collapsed(self) -> bool | None:
        """Whether scores no longer tell documents apart though they once did; None: not known.

        Without a probe, by how still the loss stands: of scores that differ, it moves with the
        batch. Where it never moved, whether scores differed once is not known.
        """
        if self.spread_left is not None:
            return self.spread_left < GONE_SPREAD
        level = self.recent
        if level is None or len(self.steps) < _FEWEST or self.steps[-1].step < 2 * _MOST_RECENT:
            return None
        losses = [step.loss for step in self.steps[-min(_MOST_RECENT, len(self.steps) // 2) :]]
        still = 0.005 * level.chance
        if max(abs(loss - level.chance) for loss in losses) >= still:
            return False
        has_moved = any(abs(step.loss - level.chance) >= still for step in self.steps)
        return True if has_moved else None

    @cached_property
    def has_gone_silent(self) -> bool:
        """Whether gradients were there once and are next to none now, in every part."""
        recent = self.steps[-self.num_recent :]
        if not any(self.largest_gradients.values()):
            return False
        return all(
            step.parts[part].gradient_norm <= SILENT * largest
            for part, largest in self.largest_gradients.items()
            for step in recent
            if part in step.parts
        )

    @cached_property
    def highest_rate(self) -> float | None:
        """The highest learning rate of any step so far."""
        rates = [step.lr for step in self.steps if step.lr is not None]
        return max(rates) if rates else None

    def by_part(self, measured: Callable[[LoggedStep, str], float]) -> dict[str, list[float]]:
        """A number of each part that trained, of the steps in which it is finite."""
        found: dict[str, list[float]] = {}
        for step in self.steps:
            for part in step.parts:
                value = measured(step, part)
                if math.isfinite(value):
                    found.setdefault(part, []).append(value)
        return found

    def part_median(self, measured: Callable[[LoggedStep, str], float]) -> dict[str, float]:
        """The median over the steps of a number of each part that trained."""
        found = self.by_part(measured)
        return {part: sorted(values)[len(values) // 2] for part, values in found.items()}

    @cached_property
    def updates(self) -> dict[str, float]:
        """Median update-to-weight ratio of each part."""
        return self.part_median(lambda step, part: step.parts[part].update_ratio)

    @cached_property
    def gradients(self) -> dict[str, float]:
        """Median gradient norm of each part."""
        return self.part_median(lambda step, part: step.parts[part].gradient_norm)

    @cached_property
    def largest_gradients(self) -> dict[str, float]:
        """The largest gradient norm of each part."""
        found = self.by_part(lambda step, part: step.parts[part].gradient_norm)
        return {part: max(norms) for part, norms in found.items()}

    @cached_property
    def largest_updates(self) -> dict[str, float]:
        """Update-to-weight ratio of each part, mean of its largest ones.

        Weights that were torn apart are large, so that later steps change little of them.
        """
        found = self.by_part(lambda step, part: step.parts[part].update_ratio)
        largest = {part: sorted(ratios)[-_LARGEST:] for part, ratios in found.items()}
        return {part: math.fsum(ratios) / len(ratios) for part, ratios in largest.items()}

    @cached_property
    def accuracy(self) -> float | None:
        """Mean of the last steps."""
        found = [
            step.accuracy for step in self.steps[-self.num_recent :] if step.accuracy is not None
        ]
        return math.fsum(found) / len(found) if found else None

    @cached_property
    def validation_losses(self) -> list[tuple[int, float, float]]:
        """(step, loss, chance) of each evaluation that has both."""
        rows = [(each.step, each.values) for each in self.evidence.evaluations]
        return [
            (step, values["loss"], values["chance"])
            for step, values in rows
            if "loss" in values and "chance" in values
        ]


def _way(probe: ProbeSignals) -> float:
    """Share of the way from chance, 0, to floor, 1, of the probe's loss."""
    return (probe.chance - probe.loss) / max(probe.chance - probe.floor, 1e-9)
