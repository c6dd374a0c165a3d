"""The ledger says before the first step what the steps then report, and refuses what cannot be."""

import json
import math
import re
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest

from colfolio.data.dataset import CorpusRow, Query, load_dataset, write_split
from colfolio.data.picks import Picker
from colfolio.data.relations import Relations
from colfolio.data.sampler import SamplerPosition
from colfolio.data.teacher import TeacherScores
from colfolio.diagnosis.ledgers.counts import (
    OTHER_ANSWERS,
    SAME_DOCUMENT,
    SAME_PAGE,
    UNSCORED,
    BatchCounter,
)
from colfolio.diagnosis.ledgers.ledger import Range, check_reachable, make_ledger
from colfolio.diagnosis.ledgers.lines import ledger_lines, ledger_rows
from colfolio.diagnosis.training_log import read_log
from colfolio.errors import DatasetError, RecipeError
from colfolio.training import TrainSettings, start_training, train

START = SamplerPosition()


@pytest.fixture
def write(tmp_path, encode_png):
    """Writes a split of `{corpus id: (document, page)}` and `{query id: {corpus id: score}}`."""

    def write(corpus, qrels, teacher=None, *, is_decodable=False):
        noise = np.random.default_rng(0)
        rows = [
            CorpusRow(
                name,
                encode_png(noise.integers(0, 256, (28, 28, 3), np.uint8)) if is_decodable else b"!",
                *place,
            )
            for name, place in corpus.items()
        ]
        queries = [Query(name, f"what is {name}") for name in qrels]
        write_split(tmp_path / "set", "train", rows, queries, qrels, teacher)
        return load_dataset(tmp_path / "set", "train")

    return write


@pytest.fixture
def crowded(write):
    """Twelve queries: three crops a page, two pages a document, shared answers, judged negatives.

    Even queries have two judged negatives, one of them on the page of their answer; query 3 has
    three answers, which query 4 has too.
    """

    def crowded(teacher=None, *, is_decodable=False):
        corpus = {f"c{n}": (f"d{n // 6}", n // 3) for n in range(18)}
        qrels = {f"q{n}": {f"c{n}": 1} for n in range(12)}
        for n in range(0, 12, 2):
            qrels[f"q{n}"] |= {f"c{n + 1}": 0, f"c{n + 6}": 0}
        qrels["q3"] |= {"c4": 1, "c17": 2}
        return write(corpus, qrels, teacher, is_decodable=is_decodable)

    return crowded


def lengths(texts):
    return [len(text.split()) for text in texts]


def recipe(steps=6, loss=None, accumulation=1, **batch):
    values = {"rows": 6, "ignore_copies": "none"} | batch
    return TrainSettings.model_validate(
        {
            "steps": steps,
            "seed": 5,
            "accumulation": accumulation,
            "loss": loss or {},
            "batch": values,
            "precision": "fp32",
        }
    )


KINDS = [
    {"kind": "info_nce", "temperature": 0.5, "symmetric": True},
    {"kind": "pairwise"},
    {"kind": "sigmoid", "bias": -2.0},
]


@pytest.mark.parametrize("loss", KINDS, ids=lambda loss: loss["kind"])
@pytest.mark.parametrize("ignore", ["none", "page", "document"])
def test_steps_report_what_the_ledger_said_of_them(crowded, retriever, ignore, loss):
    dataset = crowded(is_decodable=True)
    settings = recipe(loss=loss, hard_negatives=2, ignore=ignore, rows=5)
    ledger = make_ledger(dataset, settings, 1, retriever.collator.query_lengths)
    reports = list(train(start_training(retriever, settings), dataset))

    def mean(name):
        return float(np.mean([getattr(report, name) for report in reports]))

    parts = ledger.left_out
    masked = parts[SAME_PAGE] + parts[SAME_DOCUMENT]
    assert mean("masked") == pytest.approx(masked, abs=1e-5)
    assert mean("chance") == pytest.approx(ledger.chance, rel=1e-5)
    assert mean("floor") == pytest.approx(ledger.floor, rel=1e-5, abs=1e-7)
    candidates = [each.candidates for each in counted(dataset, settings)]
    assert [report.candidates for report in reports] == pytest.approx(
        [each.mean() for each in candidates], rel=1e-6
    )


def counted(dataset, settings, batches=6):
    return list(BatchCounter(dataset, settings, lengths).counts(START, batches))


@pytest.mark.parametrize("ignore", ["none", "page", "document"])
def test_under_distillation_candidates_are_what_the_teacher_scored_less_what_is_ignored(
    crowded, ignore
):
    teacher = {f"q{n}": {f"c{k}": 0.1 * k for k in range(n % 3, 18, 2)} for n in range(12)}
    settings = recipe(loss={"kind": "distillation"}, hard_negatives=2, ignore=ignore, rows=12)
    dataset = crowded(teacher)
    picker = Picker(dataset, settings.batch, settings.seed, TeacherScores(dataset))
    for picks, batch in zip(picker.picks(START), counted(dataset, settings), strict=False):
        rows = np.array(picks.documents)
        ignored = picker.relations.masks(picks.queries, rows)[1]
        for place, query in enumerate(picks.queries):
            scored = [f"c{row}" in teacher[f"q{query}"] for row in rows]
            kept = [is_scored and not ignored[place, k] for k, is_scored in enumerate(scored)]
            lost = [not (is_scored or ignored[place, k]) for k, is_scored in enumerate(scored)]
            assert batch.candidates[place] == sum(kept)
            assert batch.left_out[UNSCORED][place] == sum(lost)
        assert -1e-6 < batch.floor < batch.chance


def test_what_is_left_out_is_counted_by_its_reason(write):
    corpus = {"a": ("one", 0), "b": ("one", 0), "c": ("one", 1), "d": ("two", 0)}
    dataset = write(corpus, {name: {name: 1} for name in corpus} | {"e": {"d": 1}})
    (batch,) = counted(dataset, recipe(rows=5, ignore="document"), 1)
    # a and b lie on one page, c beside them in its document; d answers d and e
    assert sorted(batch.left_out[SAME_PAGE].tolist()) == [0, 0, 0, 1, 1]
    assert sorted(batch.left_out[SAME_DOCUMENT].tolist()) == [0, 0, 1, 1, 2]
    assert batch.candidates.sum() == 3 * 2 + 2 * 4
    assert batch.twice == 1


def test_other_answers_of_a_query_are_left_out_and_are_no_mask(write):
    dataset = write(
        {n: (n, 0) for n in "abc"}, {"x": {"a": 1, "b": 1}, "y": {"b": 1}, "z": {"c": 1}}
    )
    (batch,) = counted(dataset, recipe(rows=3), 1)
    assert batch.left_out[SAME_PAGE].sum() == 0
    assert batch.left_out[OTHER_ANSWERS].sum() == (batch.documents == 3)


def test_a_judged_negative_is_a_candidate_wherever_it_stands(write):
    corpus = {"a": ("one", 0), "b": ("one", 0), "c": ("two", 0)}
    dataset = write(corpus, {"x": {"a": 1, "b": 0}, "y": {"c": 1}})
    (batch,) = counted(dataset, recipe(rows=2, hard_negatives=1), 1)
    assert batch.candidates.tolist() == [3, 3]
    assert sorted(batch.hard_negatives.tolist()) == [0, 1]


def test_neither_accumulation_nor_ranks_change_who_is_compared(crowded):
    dataset = crowded()
    plain = make_ledger(dataset, recipe(steps=12), 1, lengths)
    for ranks, steps, accumulation in ((1, 3, 4), (4, 12, 1), (6, 2, 6)):
        other = make_ledger(dataset, recipe(steps, accumulation=accumulation), ranks, lengths)
        assert (other.candidates, other.left_out) == (plain.candidates, plain.left_out)
        assert (other.chance, other.floor) == (plain.chance, plain.floor)


def test_the_ledger_of_a_resumed_run_begins_where_it_goes_on(crowded):
    dataset, settings = crowded(), recipe(rows=3, hard_negatives=2)
    whole = counted(dataset, settings, 8)
    place = SamplerPosition(0, 3)
    later = make_ledger(dataset, settings, 1, lengths, position=place, batches=2)
    assert later.chance == np.mean([each.chance for each in whole[3:5]])
    assert later.chance != np.mean([each.chance for each in whole[:2]])
    assert later.documents.most == max(each.documents for each in whole[3:5])


def test_the_numbers_of_a_ledger_are_those_of_a_plain_count(crowded):
    dataset, settings = crowded(), recipe(rows=6, hard_negatives=2, candidates=5)
    relations = Relations(dataset, "page")
    picker = Picker(dataset, settings.batch, settings.seed)
    brought, twice, candidates = [], [], []
    for picks in islice(picker.picks(START), 6):
        rows = []
        for positive, refused in zip(picks.positives, picks.hard_negatives, strict=True):
            brought.append(len(refused))
            rows += [positive, *refused]
        twice.append(len(rows) - len(set(rows)))
        _, ignored = relations.masks(picks.queries, np.array(picks.documents))
        for query, lost in zip(picks.queries, ignored, strict=True):
            answers = set(relations.answers[query].tolist()) & set(picks.documents)
            candidates.append(len(picks.documents) - int(lost.sum()) - len(answers) + 1)
    ledger = make_ledger(dataset, settings, 1, lengths)
    assert ledger.twice == np.mean(twice) > 0
    assert ledger.hard_negatives == np.mean(brought)
    assert 0 < ledger.with_hard_negatives == np.mean(np.array(brought) > 0) < 1
    found = ledger.candidates
    assert (found.least, found.most) == (min(candidates), max(candidates))
    assert found.median == np.median(candidates)
    wanted = int(np.median(candidates))
    assert wanted in candidates
    settings = recipe(rows=6, hard_negatives=2, candidates=wanted)
    short = make_ledger(dataset, settings, 1, lengths).short_of_wanted
    assert 0 < short == np.mean(np.array(candidates) < wanted)


def test_no_more_batches_are_counted_than_the_run_has(crowded):
    dataset = crowded()
    assert make_ledger(dataset, recipe(2, accumulation=3), 1, lengths).batches == 6
    assert make_ledger(dataset, recipe(200), 1, lengths, batches=4).batches == 4
    assert make_ledger(dataset, recipe(9), 1, lengths, step=7).batches == 2


def test_the_shares_of_ranks_differ_by_one_at_most(crowded):
    ledger = make_ledger(crowded(), recipe(rows=11), 3, lengths)
    assert ledger.rows_of_rank == (3, 4)
    assert "11 queries, shared by 3 ranks: 3 or 4 each" in "\n".join(ledger_lines(ledger))


def test_a_number_of_candidates_that_is_reached_passes(crowded):
    ledger = make_ledger(crowded(), recipe(candidates=5, hard_negatives=0), 1, lengths)
    assert ledger.candidates.median >= 5
    assert "5 or more for the median query" in "\n".join(ledger_lines(ledger))


def test_a_number_of_candidates_that_the_dataset_cannot_give_is_refused(crowded):
    settings = recipe(candidates=12, hard_negatives=1, ignore="document")
    check_reachable(settings, 1)
    message = (
        r"batch\.candidates is 12, but half of the queries .* 6 rows x \(1 positive \+ 1 hard "
        r"negative\) .*hard negatives that a query has not.*on the page of an answer.*"
        r"Set batch\.rows to about (\d+), or batch\.candidates to (\d+) or less"
    )
    with pytest.raises(RecipeError, match=message) as raised:
        make_ledger(crowded(), settings, 1, lengths)
    advised = re.search(r"rows to about (\d+), .* to (\d+) or less", str(raised.value))
    assert advised is not None
    rows, candidates = map(int, advised.groups())
    fitting = make_ledger(crowded(), recipe(candidates=candidates, ignore="document"), 1, lengths)
    median = fitting.candidates.median
    assert math.floor(median) == candidates
    assert rows == math.ceil(6 * 12 / median)


def test_a_batch_from_one_page_is_refused_with_its_names(write):
    corpus = dict.fromkeys("abcd", ("scan.pdf", 0))
    dataset = write(corpus, {name: {name: 1} for name in corpus})
    message = r"epoch 0, batch 1: no query has .* same page as .* one page"
    with pytest.raises(DatasetError, match=message):
        make_ledger(dataset, recipe(rows=4), 1, lengths)
    assert make_ledger(dataset, recipe(rows=4, ignore="none"), 1, lengths).candidates.median == 4


def test_a_query_that_sits_out_stops_no_run_and_is_counted(write, retriever):
    # of each batch of 3, the queries a and b, of one page, sit out unless c or d is in it
    corpus = {"a": ("s", 0), "b": ("s", 0), "c": ("t", 0), "d": ("u", 0)}
    qrels = {name: {name: 1} for name in corpus}
    qrels["a"] |= {"c": 1, "d": 1}
    dataset = write(corpus, qrels, is_decodable=True)
    settings = recipe(rows=3)
    batches = counted(dataset, settings)
    out = np.concatenate([each.sits_out for each in batches])
    assert 0 < out.mean() < 1
    ledger = make_ledger(dataset, settings, 1, retriever.collator.query_lengths)
    assert ledger.sitting_out == out.mean()
    assert f"sitting out  {out.mean():.2%} of queries" in "\n".join(ledger_lines(ledger))
    assert len(np.concatenate([each.candidates for each in batches])) == (~out).sum()
    reports = list(train(start_training(retriever, settings), dataset))
    assert [each.candidates for each in reports] == pytest.approx(
        [each.candidates.mean() for each in batches]
    )
    assert [each.chance for each in reports] == pytest.approx([each.chance for each in batches])


def test_one_query_a_batch_needs_judged_negatives(write):
    dataset = write({"a": ("s", 0), "b": ("t", 0)}, {"a": {"a": 1}, "b": {"b": 1}})
    message = r"one document, that of '[ab]', .*batch\.rows to 2 or more, or judge a negative"
    with pytest.raises(DatasetError, match=message):
        make_ledger(dataset, recipe(rows=1), 1, lengths)


def test_a_taught_batch_in_which_nothing_can_be_compared_is_refused(write):
    names = "abcdef"
    teacher = {name: {name: 1.0, names[(k + 1) % 6]: 0.0} for k, name in enumerate(names)}
    dataset = write({n: (n, 0) for n in names}, {n: {n: 1} for n in names}, teacher)
    settings = {"loss": {"kind": "distillation"}, "rows": 1}
    assert make_ledger(dataset, recipe(**settings), 1, lengths).sitting_out == 0
    two = recipe(20, {"kind": "distillation"}, rows=2, hard_negatives=0)
    with pytest.raises(DatasetError, match=r"2 with a teacher's score .*Raise batch\.hard_neg"):
        make_ledger(dataset, two, 1, lengths)


def test_a_batch_in_which_all_answer_all_is_refused(write):
    corpus = {name: (name, 0) for name in "ab"}
    dataset = write(corpus, {name: {"a": 1, "b": 1} for name in "xy"})
    message = r"batch 1: no query has anything to be told from: .* 2 documents answers it"
    with pytest.raises(DatasetError, match=message):
        make_ledger(dataset, recipe(rows=2), 1, lengths)


def test_distillation_without_a_teacher_is_refused(crowded):
    with pytest.raises(DatasetError, match=r"split 'train'.* add a table 'teacher'"):
        make_ledger(crowded(), recipe(loss={"kind": "distillation"}), 1, lengths)


def test_a_bias_that_keeps_the_loss_above_chance_is_refused_with_one_that_does_not(crowded):
    dataset = crowded()
    with pytest.raises(RecipeError, match=r"loss\.bias 90 .*set loss\.bias to about -1\.\d\d"):
        make_ledger(dataset, recipe(loss={"kind": "sigmoid", "bias": 90.0}), 1, lengths)
    make_ledger(dataset, recipe(loss={"kind": "sigmoid", "bias": -1.6}), 1, lengths)


def test_a_ledger_comes_back_from_the_log_of_its_run(crowded, tmp_path):
    ledger = make_ledger(crowded(), recipe(candidates=4), 2, lengths, {"precision": "bf16"})
    lines = [{"kind": "ledger", "step": 0} | asdict(ledger), {"kind": "ledger", "rows": 3}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    log = read_log(tmp_path / "log.jsonl")
    assert log.ledger == ledger
    assert log.num_unreadable == 1


def test_lines_are_few_and_short_and_name_what_computes(crowded):
    names = {"precision": "bf16 autocast", "attention": "sdpa"}
    settings = recipe(steps=40, accumulation=4, candidates=6, hard_negatives=2)
    printed = ledger_lines(make_ledger(crowded(), settings, 4, lengths, names))
    assert len(printed) <= 12
    assert "computed    precision bf16 autocast, attention sdpa" in printed
    assert any("24 queries: 4 batches of 6, each compared within itself" in p for p in printed)


def test_no_line_is_wider_than_a_terminal_and_no_word_is_lost(crowded):
    ledger = replace(
        make_ledger(crowded(), recipe(candidates=4), 1, lengths),
        ranks=1024,
        rows=131072,
        rows_of_rank=(127, 129),
        accumulation=128,
        documents=Range(201072.0, 251072.5, 261072.0),
        hard_negatives=1.53,
        with_hard_negatives=0.72,
        twice=12345.6,
        candidates=Range(201072.0, 251072.5, 261072.0),
        wanted=250000,
        short_of_wanted=0.123,
        sitting_out=0.0123,
        left_out=dict.fromkeys((SAME_PAGE, SAME_DOCUMENT, OTHER_ANSWERS, UNSCORED), 1234.56),
        copies="exact",
        loss="info_nce, temperature 0.0123456, both directions",
        computed_with={
            "precision": "bf16 autocast",
            "attention": "flash_attention_2",
            "x": "y" * 30,
        },
    )
    printed = ledger_lines(ledger)
    assert max(map(len, printed)) <= 80
    words = " ".join(printed).split()
    for name, text in ledger_rows(ledger):
        assert set(f"{name} {text}".split()) <= set(words)
    rows = dict(ledger_rows(ledger))
    masked = "1,234.56 on the page of an answer, 1,234.56 in the document of an answer"
    assert rows["masked"] == masked
    assert rows["left out"] == "1,234.56 other answers, 1,234.56 without a teacher's score"
    assert rows["candidates"].startswith("at most median 251,072.5 (201,072 to")
    assert rows["asked for"] == "250,000 or more for the median query; 12.3% of queries get fewer"
    assert rows["copies"].startswith("exact copies of an answer are masked too")


def test_what_there_is_nothing_of_has_no_line(crowded):
    ledger = make_ledger(crowded(), recipe(ignore="none", rows=2, hard_negatives=0), 1, lengths)
    names = [name for name, _ in ledger_rows(ledger)]
    assert not {"asked for", "masked", "copies", "sitting out"} & set(names)
    assert dict(ledger_rows(ledger))["candidates"] == "2 for a query, an answer among them"


@pytest.mark.parametrize(
    ("ranks", "settings", "message"),
    [
        (4, {"rows": 3}, r"4 ranks .* batch\.rows is 3: 1 of the ranks .*--ranks 3"),
        (1, {"rows": 1, "hard_negatives": 0}, r"info_nce is always 0\. Set batch\.rows to 2"),
        (
            1,
            {"rows": 1, "hard_negatives": 0, "loss": {"kind": "pairwise"}},
            r"nothing is learnt",
        ),
        (1, {"rows": 1, "loss": {"symmetric": True}}, r"half of the loss is always 0"),
        (
            1,
            {"rows": 1, "hard_negatives": 0, "accumulation": 64},
            r"accumulation 64 adds no candidates",
        ),
        (
            2,
            {"rows": 32, "hard_negatives": 1, "candidates": 512, "accumulation": 8},
            r"is 512, but a batch brings at most 64 .* accumulation 8 adds no candidates.* 2 ranks "
            r"share these rows\. Set batch\.rows to 256 or more, or batch\.candidates to 64 or",
        ),
    ],
)
def test_what_no_dataset_could_give_is_refused_with_its_numbers(ranks, settings, message):
    with pytest.raises(RecipeError, match=message):
        check_reachable(recipe(**settings), ranks)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (4, {"rows": 4}),
        (1, {"rows": 1, "hard_negatives": 1}),
        (1, {"rows": 32, "hard_negatives": 1, "candidates": 64}),
    ],
)
def test_what_a_dataset_could_give_passes(ranks, settings):
    check_reachable(recipe(**settings), ranks)
