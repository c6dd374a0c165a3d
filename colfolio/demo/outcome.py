"""What a demo came to: `results.json` and `report.html`, from the files that its commands wrote."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from colfolio.data.dataset import RetrievalDataset, load_dataset
from colfolio.demo.plan import Command, DemoFolder
from colfolio.diagnosis import (
    CommandRun,
    Example,
    Highlight,
    MetricTable,
    PageHit,
    RankedImage,
    ReportData,
    read_log,
    write_report,
)
from colfolio.evaluation import (
    Evaluation,
    Outcome,
    Scored,
    evaluate_scores,
    fit_extent_line,
    outcomes,
    random_order_score,
    score_index,
    score_model,
)
from colfolio.models import Retriever
from colfolio.search import Searcher, hit_image

_NUM_EXAMPLES = 6
_NUM_PAGE_HITS = 3


@dataclass(frozen=True, slots=True)
class _Measured:
    """The finished demo's data and scores, which results and report are both made of."""

    strips: RetrievalDataset
    validation: RetrievalDataset
    pages: RetrievalDataset
    searcher: Searcher
    scored: Scored
    scored_pages: Scored
    headings: Evaluation
    by_page: dict[str, Evaluation]
    num_parameters: int


def write_outcome(
    folder: DemoFolder, plan: list[Command], seconds: dict[str, float], seed: int
) -> dict[str, Any]:
    """Write results and report of a finished demo, and return the results.

    Args:
        seconds: of each command, by its key.
        seed: of the run.
    """
    begin = time.monotonic()
    measured = _measure(folder)
    all_seconds = seconds | {"report": time.monotonic() - begin}
    results = _results(measured.headings, measured.by_page, all_seconds, seed)
    commands = [CommandRun(command.line, seconds.get(command.key)) for command in plan]
    write_report(_report(folder, measured, results, commands), folder / "report.html")
    results["total_seconds"] = round(sum(seconds.values()) + time.monotonic() - begin, 1)
    aside = folder / ".results.json"
    aside.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    aside.replace(folder / "results.json")
    return results


def _measure(folder: DemoFolder) -> _Measured:
    retriever = Retriever.from_pretrained(folder / "run" / "model")
    strips = load_dataset(folder / "strips", "test")
    validation = load_dataset(folder / "strips", "validation")
    pages = load_dataset(folder / "pages", "test")
    scored = score_model(retriever, strips, fit_extent_line(validation))
    searcher = Searcher(folder / "index", retriever, "best")
    scored_pages = score_index(searcher, pages)
    by_union = score_index(Searcher(folder / "index", retriever, "union"), pages)
    return _Measured(
        strips=strips,
        validation=validation,
        pages=pages,
        searcher=searcher,
        scored=scored,
        scored_pages=scored_pages,
        headings=evaluate_scores(scored),
        by_page={"best": evaluate_scores(scored_pages), "union": evaluate_scores(by_union)},
        num_parameters=sum(parameter.numel() for parameter in retriever.parameters()),
    )


def _report(
    folder: DemoFolder, measured: _Measured, results: dict[str, Any], commands: list[CommandRun]
) -> ReportData:
    found = outcomes(measured.scored)
    found_pages = outcomes(measured.scored_pages)
    return ReportData(
        title="A model that finds sections by their title",
        summary=_summary(measured),
        highlights=_highlights(results),
        commands=commands,
        recipe=(folder / "run" / "recipe.yaml").read_text(encoding="utf-8"),
        log=read_log(folder / "run" / "log.jsonl"),
        chance_ndcg=random_order_score(measured.validation, "ndcg@5"),
        tables=_tables(measured.headings, measured.by_page),
        hits=_examples(measured.strips, [outcome for outcome in found if outcome.rank == 1]),
        misses=_examples(measured.strips, [outcome for outcome in found if outcome.rank > 1]),
        page_hits=_page_hits(measured.searcher, measured.pages, found_pages),
        notes=_notes(),
        environment=_environment(results["seed"]),
    )


def _results(
    headings: Evaluation, by_page: dict[str, Evaluation], seconds: dict[str, float], seed: int
) -> dict[str, Any]:
    ndcg, unseen = headings.metric("ndcg@5"), {m.name: m for m in headings.unseen}
    page = by_page["best"].metric("ndcg@5")
    return {
        "ndcg@5": ndcg.value,
        "ndcg@5_interval": [ndcg.low, ndcg.high],
        "recall@1": headings.metric("recall@1").value,
        "mrr": headings.metric("mrr").value,
        "chance_ndcg@5": ndcg.chance,
        "baseline_ndcg@5": ndcg.baseline,
        "unseen_ndcg@5": unseen["ndcg@5"].value if unseen else None,
        "candidates": headings.num_candidates,
        "queries": headings.num_queries,
        "page_ndcg@5": page.value,
        "page_ndcg@5_interval": [page.low, page.high],
        "page_union_ndcg@5": by_page["union"].metric("ndcg@5").value,
        "page_chance_ndcg@5": page.chance,
        "page_candidates": by_page["best"].num_candidates,
        "page_queries": by_page["best"].num_queries,
        "prepare_seconds": seconds["prepare"],
        "train_seconds": seconds["train"],
        "total_seconds": round(sum(seconds.values()), 1),
        "seed": seed,
    }


def _summary(measured: _Measured) -> str:
    headings, pages = measured.headings, measured.by_page["best"]
    return (
        f"A late-interaction retriever of {measured.num_parameters / 1e6:.1f} million parameters, "
        "trained from random weights on crops of page images: its query is a section's title, its "
        f"document the picture of that heading. Measured on {headings.num_candidates:,} headings "
        f"and {pages.num_candidates:,} whole pages of documents whose families it never saw."
    )


def _highlights(results: dict[str, Any]) -> list[Highlight]:
    def beside(name: str) -> str:
        return f"chance {results[f'{name}chance_ndcg@5']:.4f}"

    unseen = results["unseen_ndcg@5"]
    return [
        Highlight(
            "nDCG@5, headings",
            f"{results['ndcg@5']:.3f}",
            f"{beside('')}, blind baseline {results['baseline_ndcg@5']:.4f}",
        ),
        Highlight("recall@1, headings", f"{results['recall@1']:.3f}"),
        Highlight("nDCG@5, unseen titles", "–" if unseen is None else f"{unseen:.3f}"),
        Highlight("nDCG@5, whole pages", f"{results['page_ndcg@5']:.3f}", beside("page_")),
        Highlight("training", f"{results['train_seconds']:.0f} s"),
        Highlight("in total", f"{results['total_seconds'] / 60:.1f} min"),
    ]


def _tables(headings: Evaluation, by_page: dict[str, Evaluation]) -> list[MetricTable]:
    best, union = by_page["best"], by_page["union"]
    return [
        MetricTable(
            f"Headings: {headings.num_queries:,} titles, {headings.num_candidates:,} candidates",
            headings.metrics,
            headings.unseen,
        ),
        MetricTable(
            f"Whole pages, best line: {best.num_queries:,} titles, {best.num_candidates:,} pages",
            best.metrics,
            best.unseen,
            "A page scores as its best line of text.",
        ),
        MetricTable(
            "Whole pages, union of lines",
            union.metrics,
            union.unseen,
            "A page scores by the vectors of all its lines together.",
        ),
    ]


def _examples(dataset: RetrievalDataset, found: list[Outcome]) -> list[Example]:
    """Examples spread evenly over the queries, so that nobody picked them."""
    chosen = [found[i] for i in _spread(len(found), _NUM_EXAMPLES)]
    return [_example(dataset, outcome) for outcome in chosen]


def _example(dataset: RetrievalDataset, outcome: Outcome) -> Example:
    corpus, query = dataset.corpus, dataset.queries[outcome.query]
    right = dataset.qrels[query.id]
    top = [
        RankedImage(corpus.image(row), score, corpus.documents[row], corpus.ids[row] in right)
        for row, score in zip(outcome.top, outcome.top_scores, strict=True)
    ]
    place = f"{corpus.documents[outcome.answer]}, page {corpus.pages[outcome.answer] + 1}"
    return Example(query.text, outcome.rank, corpus.image(outcome.answer), top, place)


def _page_hits(
    searcher: Searcher, dataset: RetrievalDataset, found: list[Outcome]
) -> list[PageHit]:
    """The first hit of queries spread evenly over those that were answered right, and one wrong."""
    right = [outcome for outcome in found if outcome.rank == 1]
    wrong = [outcome for outcome in found if outcome.rank > 1]
    chosen = [right[i] for i in _spread(len(right), _NUM_PAGE_HITS)]
    chosen += [wrong[i] for i in _spread(len(wrong), 1)]
    hits = []
    for outcome in chosen:
        text = dataset.queries[outcome.query].text
        hit = searcher.search(text, top_k=1)[0]
        caption = f"{hit.document}, page {hit.page + 1}"
        image = hit_image(searcher, hit, text)
        hits.append(PageHit(text, image, caption, hit.score, outcome.rank == 1))
    return hits


def _spread(size: int, count: int) -> list[int]:
    return np.linspace(0, size - 1, min(size, count)).round().astype(int).tolist()


def _notes() -> list[str]:
    return [
        "Ties are broken against the model: a model that scores everything alike gets no credit.",
        "The blind baseline reads nothing: it orders crops by how well the width of their ink fits "
        "the length of the title.",
        "Whole pages are found through their lines of text, which are cut out of the pixels; the "
        "model was never trained on pages.",
        "On clean printed pages like these, OCR with BM25 is the thing to beat; the README has its "
        "figures beside three seeds of this model.",
    ]


def _environment(seed: int) -> list[tuple[str, str]]:
    packages = ("colfolio", "torch", "transformers", "pypdfium2", "lancedb")
    return [
        ("seed", str(seed)),
        ("machine", f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"),
        ("Python", platform.python_version()),
        *((name, version(name)) for name in packages),
    ]
