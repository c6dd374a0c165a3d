"""What is counted before a run is what the run then draws."""

from itertools import islice

import numpy as np
import pytest
import torch

from colfolio.data.contrastive import BatchSettings, BatchSource
from colfolio.data.dataset import CorpusRow, Query, load_dataset, write_split
from colfolio.data.picks import Picker
from colfolio.data.relations import Relations
from colfolio.data.sampler import SamplerPosition
from colfolio.data.teacher import TeacherScores
from colfolio.training.losses import LossSettings, check_masks, contrastive_loss


@pytest.fixture
def dataset(tmp_path, encode_png, random_image):
    image = encode_png(random_image(28, 28))
    rows = [CorpusRow(f"c{n}", image, f"d{n}") for n in range(14)]
    queries = [Query(f"q{n}", f"Number {n}", "odd" if n % 2 else "even") for n in range(12)]
    qrels = {f"q{n}": {f"c{n}": 1, f"c{(n + 1) % 14}": 1} for n in range(12)}
    for n in range(0, 12, 3):
        qrels[f"q{n}"] |= {f"c{(n + k) % 14}": 0 for k in (4, 6, 7)}
    write_split(tmp_path / "set", "train", rows, queries, qrels)
    return load_dataset(tmp_path / "set", "train")


@pytest.mark.parametrize("start", [SamplerPosition(), SamplerPosition(1, 2)])
def test_picks_are_the_queries_and_documents_of_the_batches(dataset, shared_retriever, start):
    settings = BatchSettings(
        rows=3,
        hard_negatives=2,
        kind_weights={"odd": 1.5},
        lowercase_share=0.5,
        ignore_copies="none",
    )
    collator = shared_retriever.collator
    source = BatchSource(dataset, collator, settings, 7)
    picker = Picker(dataset, settings, 7)
    pairs = zip(source.batches(start), picker.picks(start), strict=False)
    is_lower = []
    for drawn, picks in islice(pairs, 12):
        assert sorted(drawn.batch.query_ids.tolist()) == sorted(picks.queries)
        assert sorted(drawn.batch.document_ids.tolist()) == sorted(picks.documents)
        assert drawn.after == picks.after
        tokens = [drawn.batch.queries.token_ids.numel(), sum(collator.query_lengths(picks.texts))]
        assert tokens[0] == tokens[1]
        is_lower += [text.islower() for text in picks.texts]
        for query, positive in zip(picks.queries, picks.positives, strict=True):
            assert positive in picker.relations.positives[query]
    assert {True, False} == set(is_lower)


def test_a_query_brings_no_more_hard_negatives_than_it_has(dataset):
    settings = BatchSettings(rows=12, hard_negatives=2)
    picks = next(Picker(dataset, settings, 0).picks(SamplerPosition()))
    for query, rows in zip(picks.queries, picks.hard_negatives, strict=True):
        assert len(set(rows)) == len(rows) == (2 if query % 3 == 0 else 0)
    assert len(picks.documents) == len(set(picks.documents))


@pytest.fixture
def write(tmp_path):
    """Writes `{corpus id: page}` of one document, `{query id: {corpus id: score}}`, a teacher."""

    def write(pages, qrels, teacher=None, texts=None):
        rows = [CorpusRow(name, b"!", "scan", page) for name, page in pages.items()]
        queries = [Query(name, (texts or {}).get(name, name)) for name in qrels]
        write_split(tmp_path / "set", "train", rows, queries, qrels, teacher)
        return load_dataset(tmp_path / "set", "train")

    return write


def marks(relations, queries, rows):
    """Of each query, + for what it wants, - for a negative, . for what is ignored."""
    positives, ignored = relations.masks(queries, np.array(rows))
    signs = np.where(positives.numpy(), "+", np.where(ignored.numpy(), ".", "-"))
    return ["".join(line) for line in signs]


def test_a_query_with_nothing_to_be_told_from_sits_out_and_its_document_does_not(write):
    # x wants a, whose page b and c show too; y wants d, of another page
    pages, qrels = {"a": 0, "b": 0, "c": 0, "d": 1}, {"x": {"a": 1}, "y": {"d": 1}}
    relations = Relations(write(pages, qrels), "page")
    assert marks(relations, [0, 1], [0, 1, 3]) == ["+.-", "--+"]
    assert marks(relations, [0], [0, 1, 2]) == ["..."]
    assert marks(Relations(write(pages, qrels), "document"), [0, 1], [0, 3]) == ["..", ".."]
    # of queries that share a batch, one may sit out
    both = Relations(write(pages, {"x": {"a": 1, "d": 1}, "y": {"d": 1, "b": 0}}), "page")
    assert marks(both, [0, 1], [0, 1, 3]) == ["...", "--+"]
    positives, ignored = both.masks([0, 1], np.array([0, 1, 3]))
    check_masks(positives, ignored)
    scores = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    losses = [
        contrastive_loss(*each, LossSettings()).loss.item()
        for each in (
            (torch.from_numpy(scores), positives, ignored),
            (torch.from_numpy(scores[1:]), positives[1:], ignored[1:]),
        )
    ]
    assert losses[0] == pytest.approx(losses[1])


def test_a_query_of_which_no_answer_is_there_sits_out(write):
    pages = {name: row for row, name in enumerate("abc")}
    relations = Relations(write(pages, {"x": {"a": 1}, "y": {"b": 1}}), "page")
    assert marks(relations, [0, 1], [1, 2]) == ["..", "+-"]


def test_what_looks_like_an_answer_is_ignored_unless_it_is_judged(write):
    pages = {name: row for row, name in enumerate("abcd")}
    relations = Relations(write(pages, {"x": {"a": 1, "c": 0}, "y": {"d": 1}}), "none")
    same = np.eye(4, dtype=bool)
    same[0, 1:3] = same[1:3, 0] = True
    positives, ignored = relations.masks([0, 1], np.arange(4), same)
    assert ignored.tolist() == [[False, True, False, False], [False] * 4]
    assert positives.tolist() == [[True, False, False, False], [False, False, False, True]]


def test_a_judged_negative_is_enough_to_take_part(write):
    pages = dict.fromkeys("abc", 0)
    relations = Relations(write(pages, {"x": {"a": 1, "b": 0}, "y": {"c": 1}}), "page")
    assert marks(relations, [0, 1], [0, 1, 2]) == ["+-.", "..."]


def test_what_the_teacher_scored_for_a_query_is_never_ignored_for_it(write):
    pages = dict.fromkeys("abcd", 0)
    qrels = {"x": {"a": 1}, "y": {"d": 1}}
    teacher = {"x": {"a": 1.0, "b": 0.5}, "y": {"d": 1.0, "c": 0.5, "a": 0.25}}
    dataset = write(pages, qrels, teacher)
    relations = Relations(dataset, "page", TeacherScores(dataset))
    assert marks(relations, [0, 1], [0, 1, 2, 3]) == ["+-..", "-.-+"]
    # fewer than two of what it scored: nothing to compare
    assert marks(relations, [0, 1], [0, 2, 3]) == ["...", "--+"]


@pytest.mark.parametrize("ignore", ["page", "document", "none"])
def test_every_batch_of_a_taught_run_can_be_trained_on(write, ignore):
    names = [f"c{n}" for n in range(20)]
    qrels = {f"q{n}": {names[n]: 1, names[(n + 9) % 20]: 0} for n in range(20)}
    teacher = {
        f"q{n}": {names[n]: 2.0} | {names[n // 4 * 4 + k]: -1.0 * k for k in range(4)}
        for n in range(20)
    }
    dataset = write({name: row // 4 for row, name in enumerate(names)}, qrels, teacher)
    scores = TeacherScores(dataset)
    picker = Picker(dataset, BatchSettings(rows=4, ignore=ignore), 0, scores)
    for picks in islice(picker.picks(SamplerPosition()), 10):
        rows = np.array(picks.documents)
        positives, ignored = picker.relations.masks(picks.queries, rows)
        assert not ignored.all(dim=1).any()
        check_masks(positives, ignored, torch.from_numpy(scores.between(picks.queries, rows)))


def test_hard_negatives_of_a_taught_query_are_first_what_the_teacher_scored(write):
    names = "abcdefg"
    pages = {name: row for row, name in enumerate(names)}
    # b answers a query of the same text; a and b are scored, and no negatives
    qrels = {"x": {"a": 1, "f": 0, "g": 0, "c": 0}, "same": {"b": 1}, "z": {"g": 1}}
    teacher = {"x": dict.fromkeys("abcd", 1.0), "same": dict.fromkeys("abe", 1.0)}
    teacher["z"] = dict.fromkeys("ga", 1.0)
    dataset = write(pages, qrels, teacher, {"x": "Which?", "same": "which?"})
    scores = TeacherScores(dataset)
    found = {
        wanted: [
            {names[row] for row in picks.hard_negatives[picks.queries.index(0)]}
            for picks in islice(
                Picker(dataset, BatchSettings(rows=3, hard_negatives=wanted), 0, scores).picks(
                    SamplerPosition()
                ),
                30,
            )
        ]
        for wanted in (1, 2, 3, 9)
    }
    assert {frozenset(each) for each in found[1]} == {frozenset("c"), frozenset("d")}
    assert all(each == {"c", "d"} for each in found[2])
    assert {frozenset(each) for each in found[3]} == {frozenset("cdf"), frozenset("cdg")}
    assert all(each == {"c", "d", "f", "g"} for each in found[9])
