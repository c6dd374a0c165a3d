"""What a run takes: memory of a rank by part, chunks, steps, hours and disk.

A run whose parts open in stages takes what the phase between two openings takes that needs most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from colfolio.diagnosis.planning.chunking import Chunker, Chunking, advised_cuts
from colfolio.diagnosis.planning.fixed_memory import (
    Part,
    fixed_parts,
    fixed_text_parts,
    state_bytes,
)
from colfolio.diagnosis.planning.machine import Machine, Speed, numerics_of, speed_of
from colfolio.diagnosis.planning.numerics import WIDE, Numerics
from colfolio.diagnosis.planning.operations import step_flops
from colfolio.diagnosis.planning.phases import Phase, phases_of
from colfolio.diagnosis.planning.row_sizes import BatchSize, TextSize
from colfolio.diagnosis.planning.text_chunking import TextChunker, advised_text_cuts
from colfolio.models.generator import Generator
from colfolio.models.gradient_checkpointing import checkpoint_layers
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.retriever import Retriever
from colfolio.training import TrainSettings

MARGIN = 0.1  # of the memory, for fragments of the allocator and for what else runs
_MIB = 2**20
_ROWS_TIMED = 2048  # tokens of the product that is timed, at most


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """What a run takes from one opening of a stage to the next.

    Args:
        name: the stage that opens with its first step; empty in the beginning of a run.
        first: that step; where a signal decides, the first that it can be, and not `is_exact`.
        share: of the steps of the run.
        num_weights, num_trained: of the model.
        fixed: memory that is taken whatever the chunk.
        whole: bytes while the model is not spread over ranks yet: as it is loaded, or put together
            for the opening.
        own: the recipe's cut.
        advice: the best one for all phases; None if not even a single row fits into one of them.
        flops: of a step that runs nothing twice, and of running everything once more.
        disk: by part.
    """

    name: str
    first: int
    is_exact: bool
    share: float
    num_weights: int
    num_trained: int
    fixed: tuple[Part, ...]
    whole: int
    own: Chunking
    advice: Chunking | None
    flops: tuple[float, float]
    disk: tuple[Part, ...]

    @property
    def taken(self) -> int:
        """Bytes at the highest moment of a step with the recipe's cut."""
        return sum(part.num_bytes for part in self.fixed) + self.own.peak

    def fits(self, usable: int) -> bool:
        """Whether so many bytes are enough."""
        return max(self.taken, self.whole) <= usable and self.own.fits_budget


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe comes to on a machine.

    Args:
        ranks: that share each batch; numbers of memory and operations are of one.
        batch: of all ranks.
        phases: in their order.
        epochs: None where the dataset is not there.
    """

    machine: Machine
    ranks: int
    numerics: Numerics
    batch: BatchSize | TextSize
    phases: tuple[PhasePlan, ...]
    steps: int
    epochs: float | None
    speed: Speed

    @property
    def usable(self) -> int:
        """Bytes of a rank's memory, less the margin."""
        return int(self.machine.num_bytes * (1 - MARGIN))

    @property
    def largest(self) -> PhasePlan:
        """The phase that takes most; one that does not fit, if there is any."""
        return max(self.phases, key=lambda each: (not each.fits(self.usable), each.taken))

    @property
    def fits(self) -> bool:
        """Whether the recipe can be trained as it stands."""
        return self.largest.fits(self.usable)

    @property
    def flops_a_step(self) -> float:
        """The mean over the run, with the recipe's cut, or the best where that does not fit."""
        return sum(phase.share * self.flops_of(phase) for phase in self.phases)

    def flops_of(self, phase: PhasePlan) -> float:
        """Of a step of a phase."""
        cut = phase.own if self.fits or phase.advice is None else phase.advice
        once, again = phase.flops
        return once + again * cut.share_twice

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.steps * self.flops_a_step / self.speed.flops / 3600

    @property
    def disk(self) -> tuple[Part, ...]:
        """Of the phase that takes most of it."""
        disks = (phase.disk for phase in self.phases)
        return max(disks, key=lambda disk: sum(part.num_bytes for part in disk))


def make_plan(
    model: Retriever | Generator,
    settings: TrainSettings,
    batch: BatchSize | TextSize,
    machine: Machine,
    ranks: int,
    *,
    kept_checkpoints: int,
) -> Plan:
    """Plan a run of a recipe.

    Args:
        model: on the meta device, with what is frozen in the beginning frozen.
        batch: of the model's objective.
        machine: what each rank has.
        kept_checkpoints: that stay on disk.

    Raises:
        ColfolioError: the machine lacks the kernel that the recipe names.
    """
    numerics = numerics_of(settings, machine, ranks)
    epochs = _epochs(settings, batch)
    run = _Run(settings, batch, machine, numerics, ranks, epochs, kept_checkpoints)
    phases = phases_of(model, settings, epochs)
    for phase in phases:
        checkpoint_layers(phase.model.backbone, settings.gradient_checkpointing)
    fixed = [_fixed(phase.model, run) for phase in phases]
    cuts = _cuts([phase.model for phase in phases], fixed, run)
    befores = [None, *(phase.model for phase in phases[:-1])]
    planned = [_planned(*each, run=run) for each in zip(phases, befores, fixed, cuts, strict=True)]
    speed = _speed(model, machine, numerics, cuts[0][0])
    return Plan(machine, ranks, numerics, batch, tuple(planned), settings.steps, epochs, speed)


@dataclass(frozen=True, slots=True)
class _Run:
    """What all phases share."""

    settings: TrainSettings
    batch: BatchSize | TextSize
    machine: Machine
    numerics: Numerics
    ranks: int
    epochs: float | None
    kept_checkpoints: int


def _planned(
    phase: Phase,
    before: ProjectedBackbone | None,
    fixed: Sequence[Part],
    cuts: tuple[Chunking, Chunking | None],
    run: _Run,
) -> PhasePlan:
    """The plan of a phase, with its memory and cuts.

    Args:
        before: the model in the phase before; None for the first.
    """
    model, settings = phase.model, run.settings
    own, advice = cuts
    epochs = None if run.epochs is None else run.epochs * phase.share
    return PhasePlan(
        name=phase.name,
        first=phase.first,
        is_exact=phase.is_exact,
        share=phase.share,
        num_weights=_count(model.parameters()),
        num_trained=_count(each for each in model.parameters() if each.requires_grad),
        fixed=tuple(fixed),
        whole=_whole(model, before, run),
        own=own,
        advice=advice,
        flops=step_flops(model, settings, run.batch, run.ranks, epochs),
        disk=_disk(model, settings, run.kept_checkpoints),
    )


def _fixed(model: Retriever | Generator, run: _Run) -> list[Part]:
    if isinstance(model, Generator):
        assert isinstance(run.batch, TextSize)
        return fixed_text_parts(model, run.settings, run.batch, run.numerics, run.ranks)
    assert isinstance(run.batch, BatchSize)
    return fixed_parts(model, run.settings, run.batch, run.numerics, run.ranks)


def _cuts(
    models: Sequence[Retriever | Generator], fixed: Sequence[Sequence[Part]], run: _Run
) -> list[tuple[Chunking, Chunking | None]]:
    """The recipe's cut in each phase, and the best one of all phases."""
    memory, batch = run.settings.memory, run.batch
    budget = None if memory.activation_mb is None else int(memory.activation_mb * _MIB)
    usable = int(run.machine.num_bytes * (1 - MARGIN))
    rooms = [usable - sum(part.num_bytes for part in parts) for parts in fixed]
    if isinstance(batch, TextSize):
        generators = [model for model in models if isinstance(model, Generator)]
        chunkers = [TextChunker(model, batch, run.numerics, run.ranks) for model in generators]
        advice = advised_text_cuts(chunkers, rooms)
    else:
        retrievers = [model for model in models if isinstance(model, Retriever)]
        chunkers = [Chunker(model, batch, run.numerics, run.ranks) for model in retrievers]
        advice = advised_cuts(chunkers, rooms)
    own = [chunker.chunking(memory.chunk_tokens, budget) for chunker in chunkers]
    return list(zip(own, advice or [None] * len(own), strict=True))


def _whole(model: ProjectedBackbone, before: ProjectedBackbone | None, run: _Run) -> int:
    """Bytes while a model that is spread over ranks, or will be, is whole on each.

    For an opening the shares are put together, while they and what the optimiser keeps are there.
    """
    if before is None:
        return _count(model.parameters()) * WIDE
    if not run.numerics.is_gathered:
        return 0
    weights = _count(before.parameters()) * WIDE
    return weights + weights // run.ranks + state_bytes(before, run.settings, run.ranks)


def _speed(model: ProjectedBackbone, machine: Machine, numerics: Numerics, cut: Chunking) -> Speed:
    """Of a product like those of the feed-forward."""
    text = model.backbone.config.get_text_config()
    rows = min(cut.chunk_tokens or _ROWS_TIMED, _ROWS_TIMED)
    return speed_of(machine, numerics, rows, text.hidden_size, text.intermediate_size)


def _count(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _epochs(settings: TrainSettings, batch: BatchSize | TextSize) -> float | None:
    if not batch.epoch:
        return None
    return settings.steps * settings.accumulation * batch.rows / batch.epoch


def _disk(model: ProjectedBackbone, settings: TrainSettings, kept: int) -> tuple[Part, ...]:
    """What stands there at most: one checkpoint more than is kept, while it replaces another."""
    weights = _count(model.parameters()) * WIDE
    checkpoint = weights + state_bytes(model, settings)
    parts = [
        Part(f"{kept} + 1 checkpoints", (kept + 1) * checkpoint),
        Part("the model in the end", weights),
    ]
    if settings.features.disk_mb:
        parts.append(Part("feature cache", int(settings.features.disk_mb * _MIB)))
    return tuple(parts)
