"""A report says what is the matter, what is not, and shows what its probe and its examples say."""

import math
import re
from dataclasses import asdict, replace

import numpy as np
from html_page import HOSTILE, Page
from known_runs import PROBE

from colfolio.diagnosis.causes import diagnose
from colfolio.diagnosis.reporting.heat_examples import HeatExample, TokenShare
from colfolio.diagnosis.reporting.probe_charts import score_histograms
from colfolio.diagnosis.reporting.report import Highlight, ReportData, render_report
from colfolio.diagnosis.run_evidence import evidence_of_log
from colfolio.diagnosis.training_log import LoggedEvaluation, LoggedStep, TrainingLog

CHANCE = math.log(64)
NAMED = {"step": 120, "cause": "collapsed", "told": "The model has collapsed. It is 4.16. Stop."}


def probe(step, spread=0.5, histogram=((1, 3, 0), (9, 4, 1))):
    return replace(
        PROBE,
        step=step,
        rank=16.5 - step / 100,
        spread=spread,
        query_distance=0.2,
        document_distance=0.2,
        histogram=histogram,
        edges=(-1.0, 2.0),
    )


def log(losses, probes=(), diagnoses=(), opened=0):
    steps = tuple(
        LoggedStep(
            number,
            loss,
            CHANCE,
            0.0,
            1e-3,
            100.0,
            64.0,
            0.0,
            floor=0.0,
            accuracy=0.5,
            opened=("vision",) if number == opened else (),
        )
        for number, loss in enumerate(losses, start=1)
    )
    return TrainingLog(steps, (), probes=tuple(map(asdict, probes)), diagnoses=tuple(diagnoses))


COLLAPSED = log(
    [CHANCE + 1e-4 * math.sin(n) for n in range(300)],
    [probe(0), probe(100, 0.01), probe(200, 0.001)],
    [NAMED],
    opened=81,
)
FALLING = log([0.4 + 3.7 * math.exp(-n / 60) for n in range(300)])


def words_of(log, **others):
    return Page(render_report(ReportData(title="a", log=log, **others))).words


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (28, 56, 3), dtype=np.uint8)


def example(text, rank=2):
    count = 1 if rank == 1 else 2
    token = TokenShare(text, 0.25, None if rank == 1 else 0.75, picture())
    return HeatExample(
        text, rank, 40, (picture(),) * count, (text,) * count, (1.5, 2.5)[:count], (token,)
    )


def test_a_run_that_does_not_learn_is_told_why_at_the_top():
    found = diagnose(evidence_of_log(COLLAPSED)).first
    words = words_of(COLLAPSED)
    assert found.cause == "collapsed"
    assert f"{found.title[0].upper()}{found.title[1:]} {found.sureness}" in words
    assert f"{' '.join(found.evidence)}" in words
    assert words.index("Diagnosis") < words.index("Training")


def test_what_was_ruled_out_is_folded_away_with_its_number():
    page = Page(render_report(ReportData(title="a", log=COLLAPSED)))
    found = diagnose(evidence_of_log(COLLAPSED))
    assert "details" in {tag for tag, _ in page.elements}
    assert f"Ruled out: {len(found.ruled_out)}" in page.words
    assert all(each.why in page.words for each in found.ruled_out)
    assert "Not known from this log:" in page.words


def test_a_healthy_run_is_told_so():
    html = render_report(ReportData(title="a", log=FALLING))
    assert "The run learns" in Page(html).words
    assert 'class="finding well"' in html


def test_plateaus_are_marked_by_letters_and_openings_by_numbers():
    words = words_of(COLLAPSED)
    assert (
        "1 vision opened after step 80; A The model has collapsed (said after step 120)." in words
    )
    assert "opened" not in words_of(FALLING)


def test_a_run_with_probes_shows_ranks_and_scores_at_several_steps():
    words = words_of(COLLAPSED)
    for title in ("Rank of the answer among 32", "Scores after step 0", "Scores after step 200"):
        assert title in words
    assert "Scores after" not in words_of(FALLING)


def test_probes_without_scores_have_no_histograms():
    empty = probe(0, histogram=((), ()))
    assert score_histograms([empty, replace(empty, step=5)]) == []
    assert len(score_histograms([probe(step) for step in range(200)])) == 6


def test_the_probe_is_told_in_numbers_with_their_units_first_and_last():
    first = replace(probe(0), same_winner=0.125, query_cosine=0.61)
    last = replace(probe(100), same_winner=0.875, query_cosine=0.99, mean_margin=1.75, rank=3.0)
    words = words_of(log([1.0] * 9, [first, probe(50), last]))
    for told in (
        ("step 0", "step 100"),
        ("rank of the answer", "1 to 32, chance 16.5", "16.5", "3"),
        ("answer less the mean other document", "score", "0", "1.75"),
        ("effective rank of query vectors", "1 to 32", "9", "9"),
        ("vectors of different queries", "cosine, mean", "0.61", "0.99"),
        ("same document token wins everywhere", "of all query tokens", "12.5%", "87.5%"),
    ):
        assert "".join(told) in words.replace("\n", ""), told


def test_one_probe_is_told_once():
    words = words_of(log([1.0] * 9, [probe(0)]))
    assert words.count("step 0") == 2  # the table's head and the histogram's title
    assert "Rank of the answer among" not in words


def test_numbers_of_a_probe_that_are_none_are_told_so():
    broken = replace(probe(9), query_rank=math.nan, mean_margin=math.inf, rank=math.nan)
    words = words_of(log([1.0] * 9, [broken, replace(broken, step=10)]))
    assert words[words.index("The probe") :].count("not finite") == 6


def test_bars_are_shares_of_each_histogram_and_nothing_is_written_on_them():
    few = probe(0, histogram=((1, 3, 0), (9, 4, 1)))
    many = probe(0, histogram=((10, 30, 0), (90, 40, 10)))
    (few_chart,), (many_chart,) = score_histograms([few]), score_histograms([many])
    assert "answers (4)" in few_chart.svg
    assert "others (140)" in many_chart.svg
    assert "share of each" in few_chart.svg
    bars = [
        re.findall(r'<path d="([^"]*)" clip-path', each.svg) for each in (few_chart, many_chart)
    ]
    assert bars[0] == bars[1]  # ten times as many scores are the same shares
    for chart, drawn in zip((few_chart, many_chart), bars, strict=True):
        top = min(float(y) for path in drawn for y in re.findall(r"[ML] \S+ (\S+)", path))
        names = re.findall(r' y="([^"]*)"[^>]*>(?:answers|others)', chart.svg)
        assert len(names) == 2
        assert all(float(height) < top for height in names)


LEAKED = {
    "kind": "facts",
    "step": 0,
    "data": {"queries": 64, "documents": 64, "leaked": 0.5, "validation_documents": 32},
}


def test_a_number_of_a_leaked_split_says_so_where_it_stands():
    evaluations = (LoggedEvaluation(100, "validation", {"ndcg@5": 0.9}),)
    highlights = [Highlight("ndcg@5", "0.900", is_validation=True), Highlight("loss", "0.4")]
    sound = replace(FALLING, evaluations=evaluations)
    assert "Leaked" not in words_of(sound, highlights=highlights)
    words = words_of(replace(sound, facts=(LEAKED,)), highlights=highlights)
    assert words.count("Leaked: 50% of the validation split") == 2  # the number, and its curve


def test_examples_show_both_documents_and_what_each_token_adds():
    words = words_of(FALLING, heat=[example("meson", 1), example("syriac")])
    for said in ("✓ hit", "✗ miss", "sought", "found instead", "0.25", "/ 0.75", "among 40"):
        assert said in words


def test_hostile_names_in_log_and_examples_stay_text():
    hostile = replace(COLLAPSED, diagnoses=({**NAMED, "told": f"{HOSTILE}. No."},))
    page = Page(render_report(ReportData(title="a", log=hostile, heat=[example(HOSTILE)])))
    assert "script" not in {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert page.words.count("{{ 7 * 7 }}") >= 3
