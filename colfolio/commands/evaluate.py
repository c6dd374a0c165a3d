"""`colfolio evaluate`: a model or an index against a split of a dataset, as one table."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from rich.progress import Progress
from rich.table import Table

from colfolio.commands.console import console
from colfolio.data.dataset import RetrievalDataset, load_dataset, splits_of
from colfolio.errors import ColfolioError
from colfolio.evaluation import (
    Encoder,
    Evaluation,
    ExtentLine,
    Scored,
    evaluate_scores,
    fit_extent_line,
    score_index,
    score_model,
)
from colfolio.models.precision import Precision, autocast
from colfolio.models.retriever import Retriever
from colfolio.search import Searcher, load_encoder
from colfolio.search.layout import MANIFEST

_FITTED_ON = ("validation", "train")


def evaluate_command(
    model_or_index: str | Path,
    dataset: str | Path,
    split: str = "test",
    *,
    out_json: Path | None = None,
    page_score: str | None = None,
    model: str | None = None,
    precision: Precision = "fp32",
) -> Evaluation:
    """Print how well queries find what answers them, beside chance and a blind baseline.

    Args:
        model_or_index: a checkpoint folder, a hub id, or the folder of an index of whole pages.
        dataset: a folder, file or hub id that `load_dataset` reads.
        out_json: also write the numbers there.
        page_score: of an index: `best` (the default) or `union`.
        model: of an index: where the model that made it is now; None takes where it was then.
        precision: of the model's arithmetic; `auto` is bf16 where the machine computes it natively.

    Raises:
        ColfolioError: the model, index or dataset cannot be read, or they do not fit together.
    """
    source = Path(model_or_index)
    is_index = (source / MANIFEST).is_file()
    if not is_index and (page_score is not None or model is not None):
        raise ColfolioError(
            f"{model_or_index}: page_score and model are options of an index, and this is none"
        )
    encoder = load_encoder(source, model) if is_index else _load_model(model_or_index)
    searcher = Searcher(source, encoder, page_score or "best") if is_index else None
    questions = load_dataset(dataset, split)
    fitted = _fitted_line(dataset, split)
    with autocast(precision, encoder.device):
        if searcher is not None:
            scored = score_index(searcher, questions, fitted)
        else:
            scored = _score_model(encoder, questions, fitted)
    evaluation = evaluate_scores(scored)
    _print_evaluation(evaluation)
    if out_json is not None:
        _write_json(evaluation, out_json)
    return evaluation


def _load_model(source: str | Path) -> Retriever:
    return Retriever.from_pretrained(source)


def _fitted_line(dataset: str | Path, split: str) -> ExtentLine | None:
    """The baseline's line from a split that is not evaluated, None where there is no other."""
    known = splits_of(dataset)
    others = [other for other in _FITTED_ON if other in known and other != split]
    return fit_extent_line(load_dataset(dataset, others[0])) if others else None


def _score_model(encoder: Encoder, dataset: RetrievalDataset, fitted: ExtentLine | None) -> Scored:
    with Progress(console=console(), transient=True) as bar:
        task = bar.add_task("encoding images", total=len(dataset.corpus))
        return score_model(
            encoder,
            dataset,
            fitted,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _print_evaluation(evaluation: Evaluation) -> None:
    table = Table(box=None, header_style="bold")
    table.add_column("metric")
    for name in ("model", "95 % interval", "chance", "baseline"):
        table.add_column(name, justify="right")
    if evaluation.unseen:
        table.add_column("unseen titles", justify="right")
    for row, metric in enumerate(evaluation.metrics):
        cells = [
            f"[bold]{metric.value:.3f}[/bold]",
            f"{metric.low:.3f} to {metric.high:.3f}",
            f"{metric.chance:.4f}",
            f"{metric.baseline:.4f}",
        ]
        if evaluation.unseen:
            cells.append(f"{evaluation.unseen[row].value:.3f}")
        table.add_row(metric.name, *cells)
    out = console()
    unseen = "" if evaluation.num_unseen is None else f", {evaluation.num_unseen:,} unseen titles"
    out.print(
        f"{evaluation.dataset}: {evaluation.num_queries:,} queries{unseen}, "
        f"{evaluation.num_candidates:,} candidates",
        markup=False,
    )
    out.print(table)
    out.print(
        f"[dim]baseline: length of the text against {evaluation.extent}, reads nothing; "
        f"equal scores count against the model[/dim]"
    )
    if evaluation.is_collapsed:
        out.print(
            f"[red]the model has collapsed: {evaluation.tied:.0%} of the wrong candidates score "
            f"as the right one does[/red]"
        )


def _write_json(evaluation: Evaluation, path: Path) -> None:
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(evaluation.as_json(), indent=2) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise ColfolioError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
