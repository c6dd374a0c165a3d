import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from html_page import HOSTILE, Page

from colfolio.diagnosis.ledgers.ledger import Ledger, Range
from colfolio.diagnosis.reporting import report as report_module
from colfolio.diagnosis.reporting.report import (
    MAX_REPORT_BYTES,
    CommandRun,
    Example,
    Highlight,
    MetricTable,
    PageHit,
    RankedImage,
    ReportData,
    image_uri,
    render_report,
    write_report,
)
from colfolio.diagnosis.training_log import (
    LoggedEvaluation,
    LoggedPart,
    LoggedStep,
    TrainingLog,
)


@dataclass(frozen=True)
class Mean:
    name: str = "ndcg@5"
    value: float = 0.657
    low: float = 0.633
    high: float = 0.68
    chance: float = 0.0019
    baseline: float = 0.0023


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def example(query: str, rank: int, caption: str = "manual.pdf, page 3") -> Example:
    top = [RankedImage(picture(28, 196, i), 9.5 - i, caption, i + 1 == rank) for i in range(3)]
    return Example(query, rank, picture(28, 196), top, caption)


def ledger(text: str) -> Ledger:
    return Ledger(
        batches=32,
        ranks=3,
        rows=128,
        rows_of_rank=(42, 43),
        accumulation=4,
        documents=Range(120.0, 126.0, 128.0),
        hard_negatives=0.0,
        with_hard_negatives=0.0,
        twice=2.5,
        sitting_out=0.0,
        candidates=Range(118.0, 125.0, 128.0),
        wanted=100,
        short_of_wanted=0.0,
        left_out={"on the page of an answer": 1.25, "other answers": 0.0},
        copies="near",
        loss="info_nce, temperature 1",
        chance=4.83,
        floor=0.0,
        computed_with={"precision": text},
    )


def opening(row: LoggedStep) -> LoggedStep:
    parts = {"vision": LoggedPart(1e-3, 0.5, 1e-4)} if row.step >= 101 else {}
    opened = ("vision[0:4]", "merger") if row.step == 101 else ()
    return replace(row, parts=parts, opened=opened)


def full_report(text: str = "Usage notes", num_steps: int = 300) -> ReportData:
    steps = [
        LoggedStep(n, 5 / n, math.log(128), 0.1, 1e-3, 900.0, 120.0 + n % 3, 1.25, n == 7)
        for n in range(1, num_steps)
    ]
    evaluations = (LoggedEvaluation(100, "validation", {"ndcg@5": 0.4}),)
    return ReportData(
        title=text,
        summary=text,
        highlights=[Highlight(text, text, text)],
        commands=[CommandRun(text, 75.0), CommandRun("colfolio evaluate")],
        recipe=text,
        log=TrainingLog(tuple(steps), evaluations, 1, ledger(text)),
        chance_ndcg=0.006,
        tables=[MetricTable(text, [Mean()], [Mean(value=0.612)], text), MetricTable("b", [Mean()])],
        hits=[example(text, 1, text)],
        misses=[example(text, 1234, text)],
        page_hits=[PageHit(text, picture(60, 40), text, 3.0, flag) for flag in (True, False, None)],
        notes=[text],
        environment=[(text, text)],
    )


def test_every_part_is_shown_in_well_formed_html():
    page = Page(render_report(full_report()))
    for words in (
        "Usage notes",
        "0.657",
        "[0.633, 0.680]",
        "0.0019",
        "0.0023",
        "unseen titles",
        "0.612",
        "Loss",
        "nDCG@5 on validation",
        "1 unreadable line(s)",
        "1 min 15 s",
        "right answer at rank 1,234",
        "✓ right",
        "✗ wrong",
        "Hits",
        "Misses",
        "Recipe",
        "512 queries: 4 batches of 128, each compared within itself",
        "128 queries, shared by 3 ranks: 42 or 43 each",
        "at most median 125 (118 to 128) for a query",
        "100 or more for the median query",
        "1.25 on the page of an answer",
        "near copies of an answer are masked too",
        "In 299 steps a query was compared with 121.0 documents on average",
        "Skipped, for gradients overflowed: 1 step.",
    ):
        assert words in page.words, words


@pytest.mark.parametrize(("num_steps", "size"), [(61, 2), (300, 5), (1000, 17)])
def test_the_mean_that_a_thick_line_is_of_is_told(num_steps, size):
    steps = [LoggedStep(n, 5 / n, None, None, None, None) for n in range(1, num_steps + 1)]
    words = Page(render_report(ReportData(title="a", log=TrainingLog(tuple(steps), ())))).words
    assert f"the mean of {size} steps at a time" in words


def test_a_report_of_nothing_but_a_title_has_no_empty_parts():
    page = Page(render_report(ReportData(title="Empty")))
    assert "h2" not in {tag for tag, _ in page.elements}


def test_a_run_that_said_nothing_of_its_batches_has_its_curves_alone():
    steps = [LoggedStep(n, 5 / n, None, None, None, None) for n in range(1, 9)]
    page = Page(render_report(ReportData(title="a", log=TrainingLog(tuple(steps), ()))))
    assert "Every step is a point of its curve" in page.words
    assert "compared with" not in page.words


def test_a_run_that_was_stopped_before_its_second_step_still_shows_its_ledger():
    page = Page(render_report(ReportData(title="a", log=TrainingLog((), (), 0, ledger("fp32")))))
    assert "What a query is compared with" in page.words
    assert "of its curve" not in page.words


def test_hostile_text_stays_text_wherever_it_stands():
    page = Page(render_report(full_report(HOSTILE)))
    harmless = Page(render_report(full_report("harmless")))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
    assert "script" not in {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert page.words.count("{{ 7 * 7 }}") == harmless.words.count("harmless")


def test_a_report_names_nothing_outside_itself():
    html = render_report(full_report())
    for tag, attributes in Page(html).elements:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "srcset", "action"}:
                assert value.startswith(("data:image/webp;base64,", "#")), (tag, name)
    for target in re.findall(r"url\(([^)]*)\)", html):
        assert target.startswith("#"), target
    assert "@import" not in html


def test_a_browser_is_told_to_load_nothing():
    assert "default-src 'none'; img-src data:" in render_report(ReportData(title="a"))


def test_a_report_of_many_large_pages_stays_small():
    pages = [PageHit("a", picture(1200, 900, i), "b", 1.0) for i in range(5)]
    strips = [example("title", 2) for _ in range(20)]
    html = render_report(ReportData(title="a", page_hits=pages, hits=strips, misses=strips))
    assert len(html.encode()) < MAX_REPORT_BYTES


def test_pages_keep_their_size_where_there_is_room(monkeypatch):
    widths = []
    original = report_module.image_uri
    monkeypatch.setattr(
        report_module,
        "image_uri",
        lambda image, width: widths.append(width) or original(image, width),
    )
    render_report(ReportData(title="a", page_hits=[PageHit("a", picture(140, 100), "b", 1.0)]))
    assert widths == [900]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (4000, 1), (28, 392)])
def test_an_image_of_any_shape_becomes_a_data_uri(height, width):
    assert image_uri(picture(height, width), 300).startswith("data:image/webp;base64,")


def test_a_report_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "out" / "report.html"
    write_report(ReportData(title="first"), path)
    monkeypatch.setattr(report_module, "render_report", lambda _report: "half\ud800")
    with pytest.raises(UnicodeEncodeError):
        write_report(ReportData(title="second"), path)
    assert "first" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_title_in_any_script_survives(tmp_path):
    path = tmp_path / "report.html"
    write_report(ReportData(title="Übersicht 概要 ملخص"), path)
    assert "Übersicht 概要 ملخص" in Page(path.read_text(encoding="utf-8")).words


def test_what_opened_and_what_each_part_did_are_shown():
    log = full_report().log
    evaluation = LoggedEvaluation(9, "validation", {"loss": 1.0, "chance": 4.0, "negatives": 64.0})
    changed = TrainingLog(tuple(map(opening, log.steps)), (evaluation,))
    words = Page(render_report(ReportData(title="a", log=changed))).words
    assert "1 vision[0:4], merger opened after step 100." in words
    assert "Update over weights, by part" in words
    assert "Validation loss, 64 negatives" in words
    assert "the same negatives every time" in words


def test_the_dead_share_of_each_part_is_shown_where_the_log_has_it():
    steps = list(map(opening, full_report().log.steps))
    old = Page(render_report(ReportData(title="a", log=TrainingLog(tuple(steps), ())))).words
    assert "gradient norm, last" in old
    assert "dead, last" not in old
    for place in (-2, -1):
        part = replace(steps[place].parts["vision"], dead=0.25 if place == -1 else 0.75)
        steps[place] = replace(steps[place], parts={"vision": part})
    words = Page(render_report(ReportData(title="a", log=TrainingLog(tuple(steps), ())))).words
    assert "dead, last" in words
    assert "25.0%" in words
    assert "75.0%" not in words


def test_a_part_without_gradient_is_told_in_a_sentence():
    steps = []
    for row in map(opening, full_report().log.steps):
        norm = 0.0 if row.step >= 150 else 1.0
        parts = {name: replace(part, gradient_norm=norm) for name, part in row.parts.items()}
        steps.append(replace(row, parts=parts))
    words = Page(render_report(ReportData(title="a", log=TrainingLog(tuple(steps), ())))).words
    assert "The gradient of vision is 0 from step 150 on." in words


def test_a_log_without_parts_still_makes_a_report():
    words = Page(render_report(full_report())).words
    assert "Loss" in words
    for absent in (
        "by part",
        "The parts of the model",
        "The probe",
        "Dotted lines",
        "Validation loss",
    ):
        assert absent not in words


def test_hostile_names_of_parts_stay_text():
    steps = [
        LoggedStep(n, 1.0, 2.0, None, None, None, opened=(HOSTILE,) if n == 4 else ())
        for n in range(1, 9)
    ]
    page = Page(render_report(ReportData(title="a", log=TrainingLog(tuple(steps), ()))))
    assert "{{ 7 * 7 }}" in page.words
    assert "script" not in {tag for tag, _ in page.elements}
