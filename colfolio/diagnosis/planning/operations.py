"""Operations of an optimiser step of a rank, and how many a cache of frozen features saves."""

from __future__ import annotations

from colfolio.diagnosis.planning.arithmetic import work_of
from colfolio.diagnosis.planning.chunking import rows_alike
from colfolio.diagnosis.planning.fixed_memory import rows_of_rank
from colfolio.diagnosis.planning.graph_memory import vision_width
from colfolio.diagnosis.planning.numerics import WIDE
from colfolio.diagnosis.planning.row_sizes import BatchSize, RowSize, TextSize
from colfolio.models.border import frozen_border
from colfolio.models.generator import Generator
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.retriever import Retriever
from colfolio.models.towers import exits
from colfolio.training import TrainSettings

_MIB = 2**20


def step_flops(
    model: Retriever | Generator,
    settings: TrainSettings,
    batch: BatchSize | TextSize,
    ranks: int,
    epochs: float | None,
) -> tuple[float, float]:
    """Operations of an optimiser step, the mean over some epochs, and those of a second forward.

    Args:
        model: with what is frozen frozen.
        epochs: over which the model trains so; None where the dataset is not there.
    """
    if isinstance(model, Generator):
        assert isinstance(batch, TextSize)
        return _of_conversations(model, settings, batch, ranks, epochs)
    assert isinstance(batch, BatchSize)
    return _of_rows(model, settings, batch, ranks, epochs)


def _of_rows(
    retriever: Retriever,
    settings: TrainSettings,
    batch: BatchSize,
    ranks: int,
    epochs: float | None,
) -> tuple[float, float]:
    """Operations where some rows may run a second time."""
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


def _of_conversations(
    generator: Generator,
    settings: TrainSettings,
    batch: TextSize,
    ranks: int,
    epochs: float | None,
) -> tuple[float, float]:
    """Operations of conversations, of which none runs a second time."""
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
