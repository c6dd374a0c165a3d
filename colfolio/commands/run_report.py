"""The report of a finished training run: its curves, its ledger, its recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, isfinite
from statistics import fmean

from colfolio.commands.run_folder import RECIPE_FILE, RunFolder, TrainRecipe, dataset_name
from colfolio.data.conversations import ConversationDataset
from colfolio.data.dataset import RetrievalDataset
from colfolio.diagnosis import Highlight, ReportData, TrainingLog, read_log, write_report
from colfolio.diagnosis.reporting.drawing import stretch_size
from colfolio.diagnosis.reporting.heat_examples import HeatExample, heat_examples
from colfolio.evaluation import random_order_score
from colfolio.training import TrainingState

_IN_FULL = 0.0005  # below which three decimals would say that chance is 0


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
    chance_ndcg = random_order_score(validation, "ndcg@5") if is_ranked else None
    report = ReportData(
        title=f"Training run: {run.path.name}",
        summary=f"{recipe.train.steps:,} steps on {dataset_name(recipe)}, split {recipe.split}.",
        highlights=_highlights(log, chance_ndcg),
        recipe=(run.path / RECIPE_FILE).read_text(encoding="utf-8"),
        log=log,
        heat=heat,
        chance_ndcg=chance_ndcg,
    )
    write_report(report, run.report)


def _highlights(log: TrainingLog, chance_ndcg: float | None) -> list[Highlight]:
    """What the last step and the last evaluation came to."""
    found = [_last_loss(log)] if log.steps else []
    if log.evaluations:
        measured = log.evaluations[-1]
        chances = _chances(measured.values, chance_ndcg)
        if "chance" in measured.values and "loss" not in measured.values:
            found.append(Highlight(f"loss, {measured.split}", "–", "not finite"))
        for name, value in measured.values.items():
            if name not in ("chance", "negatives"):
                note = _beside(chances.get(name))
                told = (f"{name}, {measured.split}", f"{value:.3f}", note)
                found.append(Highlight(*told, is_validation=True))
    return found


def _last_loss(log: TrainingLog) -> Highlight:
    """The loss of the last step; and the mean that ends its curve, where that is another number."""
    label, last = "loss, last step", log.steps[-1]
    losses = [row.loss for row in log.steps if isfinite(row.loss)]
    if not isfinite(last.loss):
        return Highlight(label, "–", "not finite")
    notes, size = [_beside(last.chance)], stretch_size(len(losses))
    value, mean = f"{last.loss:.3f}", f"{fmean(losses[-size:]):.3f}"
    if mean != value:
        notes.append(f"mean of the last {size}, the end of its curve: {mean}")
    return Highlight(label, value, "; ".join(filter(None, notes)))


def _chances(values: Mapping[str, float], chance_ndcg: float | None) -> dict[str, float]:
    """What scores without information give, by the names of an evaluation."""
    chances = {} if chance_ndcg is None else {"ndcg@5": chance_ndcg}
    if "chance" in values:
        # of text, chance is the logarithm of how many tokens are as likely
        chances |= {"loss": values["chance"], "token_accuracy": exp(-values["chance"])}
    return chances


def _beside(chance: float | None) -> str:
    if chance is None:
        return ""
    return f"chance {chance:.3f}" if chance >= _IN_FULL else f"chance {chance:.1e}"
