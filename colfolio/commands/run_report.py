"""The report of a finished training run: its curves, its ledger, its recipe."""

from __future__ import annotations

from collections.abc import Sequence

from colfolio.commands.run_folder import RECIPE_FILE, RunFolder, TrainRecipe, dataset_name
from colfolio.data.conversations import ConversationDataset
from colfolio.data.dataset import RetrievalDataset
from colfolio.diagnosis import Highlight, ReportData, TrainingLog, read_log, write_report
from colfolio.diagnosis.heat_examples import HeatExample, heat_examples
from colfolio.evaluation import random_order_score
from colfolio.training import TrainingState


def examples_of(
    state: TrainingState, validation: RetrievalDataset | ConversationDataset | None
) -> list[HeatExample]:
    """Hits and misses of the validation split, drawn; none of conversations.

    A model that is spread over ranks runs on all of them, so that all of them ask.
    """
    if not isinstance(validation, RetrievalDataset):
        return []
    if not (state.world.is_main or state.is_sharded):
        return []
    return heat_examples(state.retriever, validation, state.settings.precision)


def write_run_report(
    run: RunFolder,
    recipe: TrainRecipe,
    validation: RetrievalDataset | ConversationDataset | None,
    heat: Sequence[HeatExample] = (),
) -> None:
    """Write `report.html` into the run folder, from the run's log.

    Args:
        validation: the split that was evaluated while it went on.
        heat: examples of it.
    """
    log = read_log(run.log)
    is_ranked = isinstance(validation, RetrievalDataset)
    report = ReportData(
        title=f"Training run: {run.path.name}",
        summary=f"{recipe.train.steps:,} steps on {dataset_name(recipe)}, split {recipe.split}.",
        highlights=_highlights(log),
        recipe=(run.path / RECIPE_FILE).read_text(encoding="utf-8"),
        log=log,
        heat=heat,
        chance_ndcg=random_order_score(validation, "ndcg@5") if is_ranked else None,
    )
    write_report(report, run.report)


def _highlights(log: TrainingLog) -> list[Highlight]:
    """What the last step and the last evaluation came to."""
    found = []
    if log.steps:
        last = log.steps[-1]
        found.append(Highlight("loss, last step", f"{last.loss:.3f}", _beside(last.chance)))
    if log.evaluations:
        measured = log.evaluations[-1]
        for name, value in measured.values.items():
            note = _beside(measured.values.get("chance")) if name == "loss" else ""
            if name not in ("chance", "negatives"):
                found.append(Highlight(f"{name}, {measured.split}", f"{value:.3f}", note))
    return found


def _beside(chance: float | None) -> str:
    return "" if chance is None else f"chance {chance:.3f}"
