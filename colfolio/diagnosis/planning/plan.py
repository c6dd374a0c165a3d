"""What a run takes: memory of a rank by part, chunks, steps, hours and disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from colfolio.diagnosis.planning.arithmetic import work_of
from colfolio.diagnosis.planning.chunking import Chunker, Chunking, rows_alike
from colfolio.diagnosis.planning.fixed_memory import (
    Part,
    fixed_parts,
    fixed_text_parts,
    rows_of_rank,
    state_bytes,
)
from colfolio.diagnosis.planning.graph_memory import vision_width
from colfolio.diagnosis.planning.machine import Machine, Speed, numerics_of, speed_of
from colfolio.diagnosis.planning.numerics import WIDE, Numerics
from colfolio.diagnosis.planning.row_sizes import BatchSize, RowSize, TextSize
from colfolio.diagnosis.planning.text_chunking import TextChunker
from colfolio.models.border import frozen_border
from colfolio.models.generator import Generator
from colfolio.models.gradient_checkpointing import checkpoint_layers
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.retriever import Retriever
from colfolio.models.towers import exits
from colfolio.training import TrainSettings

MARGIN = 0.1  # of the memory, for fragments of the allocator and for what else runs
_MIB = 2**20
_ROWS_TIMED = 2048  # tokens of the product that is timed, at most


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe comes to on a machine.

    Args:
        ranks: that share each batch; numbers of memory and operations are of one.
        batch: of all ranks.
        num_weights, num_trained: of the model.
        fixed: memory that is taken whatever the chunk.
        own: the recipe's cut.
        advice: the best one; None if not even a single row fits.
        epochs: None where the dataset is not there.
        flops: of a step that runs nothing twice, and of running everything once more.
        disk: by part.
    """

    machine: Machine
    ranks: int
    numerics: Numerics
    batch: BatchSize | TextSize
    num_weights: int
    num_trained: int
    fixed: tuple[Part, ...]
    own: Chunking
    advice: Chunking | None
    steps: int
    epochs: float | None
    flops: tuple[float, float]
    speed: Speed
    disk: tuple[Part, ...]

    @property
    def usable(self) -> int:
        """Bytes of a rank's memory, less the margin."""
        return int(self.machine.num_bytes * (1 - MARGIN))

    @property
    def taken(self) -> int:
        """Bytes at the highest moment of a step with the recipe's cut."""
        return sum(part.num_bytes for part in self.fixed) + self.own.peak

    @property
    def loading(self) -> int:
        """Bytes that a rank takes to load the model, which is only then spread over ranks."""
        return self.num_weights * WIDE

    @property
    def fits(self) -> bool:
        """Whether the recipe can be trained as it stands."""
        return max(self.taken, self.loading) <= self.usable and self.own.fits_budget

    @property
    def flops_a_step(self) -> float:
        """With the recipe's cut, or with the best where that does not fit."""
        cut = self.own if self.fits or self.advice is None else self.advice
        once, again = self.flops
        return once + again * cut.share_twice

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.steps * self.flops_a_step / self.speed.flops / 3600


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
        model: on the meta device, with what is frozen frozen.
        batch: of the model's objective.
        machine: what each rank has.
        kept_checkpoints: that stay on disk.

    Raises:
        ColfolioError: the machine lacks the kernel that the recipe names.
    """
    numerics = numerics_of(settings, machine, ranks)
    checkpoint_layers(model.backbone, settings.gradient_checkpointing)
    epochs = _epochs(settings, batch)
    if isinstance(model, Generator):
        assert isinstance(batch, TextSize)
        fixed = fixed_text_parts(model, settings, batch, numerics, ranks)
        chunker = TextChunker(model, batch, numerics, ranks)
        flops = _text_flops(model, settings, batch, ranks, epochs)
    else:
        assert isinstance(batch, BatchSize)
        fixed = fixed_parts(model, settings, batch, numerics, ranks)
        chunker = Chunker(model, batch, numerics, ranks)
        flops = _flops(model, settings, batch, ranks, epochs)
    own, advice = _cuts(chunker, settings, machine, fixed)
    return Plan(
        machine=machine,
        ranks=ranks,
        numerics=numerics,
        batch=batch,
        num_weights=_count(model.parameters()),
        num_trained=_count(each for each in model.parameters() if each.requires_grad),
        fixed=tuple(fixed),
        own=own,
        advice=advice,
        steps=settings.steps,
        epochs=epochs,
        flops=flops,
        speed=_speed(model, machine, numerics, own),
        disk=_disk(model, settings, kept_checkpoints),
    )


def _cuts(
    chunker: Chunker | TextChunker,
    settings: TrainSettings,
    machine: Machine,
    fixed: Sequence[Part],
) -> tuple[Chunking, Chunking | None]:
    """The recipe's cut, and the best one."""
    memory = settings.memory
    budget = None if memory.activation_mb is None else int(memory.activation_mb * _MIB)
    room = int(machine.num_bytes * (1 - MARGIN)) - sum(part.num_bytes for part in fixed)
    return chunker.chunking(memory.chunk_tokens, budget), chunker.advice(room)


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


def _flops(
    retriever: Retriever,
    settings: TrainSettings,
    batch: BatchSize,
    ranks: int,
    epochs: float | None,
) -> tuple[float, float]:
    """Operations of an optimiser step, the mean over the run, and those of a second forward."""
    queries, documents = rows_of_rank(batch, ranks)
    document = work_of(retriever, rows_alike(1, batch.document)).times(documents)
    query = work_of(retriever, rows_alike(1, batch.query)).times(queries)
    found = _from_cache(retriever, settings, batch.document, batch.corpus, epochs)
    below = document.below * (1 - found) + query.below
    forward = document.forward + query.forward
    pairs = queries * batch.query.tokens * batch.documents * batch.document.tokens
    scores = 2 * pairs * retriever.dim
    once = below + forward + document.backward + query.backward + scores
    return once * settings.accumulation, float(forward * settings.accumulation)


def _text_flops(
    generator: Generator,
    settings: TrainSettings,
    batch: TextSize,
    ranks: int,
    epochs: float | None,
) -> tuple[float, float]:
    """Likewise of conversations, of which none runs a second time."""
    work = work_of(generator, rows_alike(1, batch.row)).times(-(-batch.rows // ranks))
    found = _from_cache(generator, settings, batch.row, batch.corpus, epochs)
    once = work.below * (1 - found) + work.forward + work.backward
    return once * settings.accumulation, 0.0


def _from_cache(
    model: ProjectedBackbone,
    settings: TrainSettings,
    row: RowSize,
    corpus: int | None,
    epochs: float | None,
) -> float:
    """The share of rows whose frozen features are found, over all epochs.

    Args:
        row: of those whose features are kept, of which an epoch has `corpus`.
    """
    border = frozen_border(model.backbone, is_visual=True)
    budget = (settings.features.ram_mb + settings.features.disk_mb) * _MIB
    if border is None or not budget or not corpus or not epochs or epochs <= 1:
        return 0.0
    visual = model.backbone.visual
    merge = model.contract.pixel_budget.merge
    hidden = model.backbone.config.get_text_config().hidden_size
    if border.tower == "vision":
        numbers = row.patches * vision_width(visual.blocks[0])
    elif border.layers:
        numbers = row.tokens * hidden
    else:
        numbers = row.patches // merge**2 * hidden * len(exits(visual))
    kept = min(1.0, budget / (numbers * WIDE * corpus))
    return kept * (1 - 1 / epochs)


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
