"""Facts of the data: each found where it is planted, and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from colfolio.data.dataset import CorpusRow, Query, load_dataset, write_split
from colfolio.data.picks import BatchSettings, Picker
from colfolio.diagnosis.signals import measure_data
from colfolio.diagnosis.signals.data_facts import copied_share, truncated_share
from colfolio.diagnosis.signals.drawn_rows import meeting_again, with_neighbours
from colfolio.diagnosis.signals.read_images import ReadImages


@pytest.fixture
def write(tmp_path, encode_png):
    """Writes splits of (text, image) and loads them; query n is answered by its own document."""

    def write(name="train", documents=None, **splits):
        folder = tmp_path / name
        for split, pairs in splits.items():
            rows = [
                CorpusRow(
                    f"{split}-{n}", encode_png(image), (documents or {}).get(n, f"{split}{n}")
                )
                for n, (_, image) in enumerate(pairs)
            ]
            queries = [Query(f"{split}-{n}", text) for n, (text, _) in enumerate(pairs)]
            write_split(folder, split, rows, queries, {q.id: {q.id: 1} for q in queries})
        return [load_dataset(folder, split) for split in splits]

    return write


@pytest.fixture
def facts_of(shared_retriever):
    def facts_of(dataset, validation=None, probe=None, **settings):
        batch = BatchSettings.model_validate({"rows": 6} | settings)
        picker = Picker(dataset, batch, 0)
        return measure_data(dataset, shared_retriever.collator, batch, picker, probe, validation)

    return facts_of


def test_clean_data_has_no_fault(shapes, held_out, facts_of, make_batch):
    facts = facts_of(shapes, held_out, make_batch())
    assert (facts.queries, facts.documents, facts.validation_documents) == (40, 40, 12)
    assert (facts.truncated, facts.blank, facts.copies, facts.leaked) == (0, 0, 0, 0)
    # 56 x 112 pixels are 2 x 4 tokens; three of the template's stand around them
    assert facts.median_document_tokens == 8 + len(_template_ids(make_batch()))
    lengths = make_batch().queries.lengths
    assert lengths.min() <= facts.median_query_tokens <= lengths.max()
    assert facts.epoch_overlap < 0.4
    assert facts.neighbours < 0.4


def _template_ids(batch):
    row = batch.documents.rows(0, 1)
    return row.token_ids[row.token_ids != row.token_ids.mode().values]


def test_blank_images_are_counted(write, facts_of, random_image):
    white = np.full((28, 28, 3), 255, np.uint8)
    pairs = [(f"text {n}", white if n < 4 else random_image(28, 28, n)) for n in range(16)]
    (dataset,) = write(train=pairs)
    assert facts_of(dataset).blank == pytest.approx(4 / 16)


@pytest.mark.parametrize(("likeness", "expected"), [("exact", 0.0), ("none", 5 / 6)])
def test_copies_count_where_they_are_negatives(write, facts_of, random_image, likeness, expected):
    same = random_image(28, 28)
    (dataset,) = write(train=[(f"text {n}", same) for n in range(12)])
    if likeness == "exact":  # every query would sit out
        pairs = [(f"text {n}", same if n < 3 else random_image(28, 28, n)) for n in range(12)]
        (dataset,) = write("some", train=pairs)
    assert facts_of(dataset, ignore_copies=likeness).copies == pytest.approx(expected)


def test_queries_spelt_alike_make_their_documents_copies(write, facts_of, random_image):
    texts = ["red  circle", "Red circle ", "red circle\t", *(f"text {n}" for n in range(3))]
    (dataset,) = write(train=[(text, random_image(28, 28, n)) for n, text in enumerate(texts)])
    # three queries have two of six candidates that answer them
    assert facts_of(dataset).copies == pytest.approx(3 * (2 / 6) / 6)


def test_copies_are_counted_by_their_definition():
    generator = torch.Generator().manual_seed(0)
    positives = torch.eye(5, 7, dtype=torch.bool)
    ignored = (torch.rand(5, 7, generator=generator) < 0.2) & ~positives
    alike = torch.rand(7, 7, generator=generator) < 0.3
    alike = alike | alike.T | torch.eye(7, dtype=torch.bool)
    answering = (torch.rand(5, 7, generator=generator) < 0.2) | positives
    expected = []
    for query in range(5):
        negatives = [d for d in range(7) if not positives[query, d] and not ignored[query, d]]
        copies = [
            d
            for d in negatives
            if answering[query, d] or any(alike[p, d] for p in range(7) if positives[query, p])
        ]
        expected.append(len(copies) / (len(negatives) + 1))
    assert copied_share(positives, ignored, alike, answering) == pytest.approx(expected)


def test_validation_images_that_training_has_are_found(write, facts_of, random_image):
    pairs = [(f"text {n}", random_image(28, 28, n)) for n in range(24)]
    others = [
        (f"question {n}", pairs[n][1] if n < 3 else random_image(56, 28, n)) for n in range(12)
    ]
    train, validation = write(train=pairs, validation=others)
    assert facts_of(train, validation).leaked == pytest.approx(3 / 12)


def test_an_image_of_the_same_place_is_found_in_a_corpus_of_any_size(
    write, facts_of, random_image, monkeypatch
):
    pairs = [(f"text {n}", random_image(28, 28, n)) for n in range(40)]
    train, validation = write(
        documents={n: f"d{n}" for n in range(40)},
        train=pairs,
        validation=[("question", pairs[37][1])],
    )
    monkeypatch.setattr(validation.corpus, "documents", ["d37"])
    monkeypatch.setattr(train.corpus, "pages", [0] * 40)
    monkeypatch.setattr(validation.corpus, "pages", [0])
    monkeypatch.setattr("colfolio.diagnosis.signals.data_facts._MOST_DRAWN", 2)
    monkeypatch.setattr("colfolio.diagnosis.signals.data_facts._MOST_IMAGES", 4)
    assert facts_of(train, validation).leaked == 1


@pytest.fixture
def asked_again(write, random_image):
    """Training, and a validation split that asks four of its ten texts, of the images given."""

    def make(images):
        pairs = [(f"text {n}", random_image(28, 28, n)) for n in range(24)]
        others = [(f"question {n}", random_image(56, 28, 90 + n)) for n in range(6)]
        return write(
            train=pairs,
            validation=[*((f"Text  {n}", image) for n, image in enumerate(images)), *others],
        )

    return make


def test_a_common_question_on_other_pages_leaks_nothing(asked_again, facts_of, random_image):
    train, validation = asked_again([random_image(56, 28, n) for n in range(4)])
    assert facts_of(train, validation).leaked == 0


def test_queries_that_training_asks_of_the_same_page_are_found(
    asked_again, facts_of, random_image, monkeypatch
):
    pages = [random_image(28, 28, n) for n in range(3)] + [random_image(56, 28, 3)]
    train, validation = asked_again(pages)
    # of the images alone nothing is seen
    monkeypatch.setattr("colfolio.diagnosis.signals.data_facts._leaked_images", lambda *_: 0.0)
    assert facts_of(train, validation).leaked == pytest.approx(3 / 10)
    known = [replace(query, seen=True) for query in validation.queries]
    monkeypatch.setattr(validation, "queries", known)
    assert facts_of(train, validation).leaked == 0


def test_of_many_queries_that_training_asks_some_are_looked_at(
    asked_again, facts_of, random_image, monkeypatch
):
    train, validation = asked_again([random_image(28, 28, n) for n in range(4)])
    monkeypatch.setattr("colfolio.diagnosis.signals.data_facts._leaked_images", lambda *_: 0.0)
    monkeypatch.setattr("colfolio.diagnosis.signals.data_facts._MOST_HELD_OUT", 2)
    assert facts_of(train, validation).leaked == pytest.approx(4 / 10)


def test_documents_that_lost_image_tokens_are_counted(make_batch, shared_retriever):
    batch, collator = make_batch(), shared_retriever.collator
    assert truncated_share(batch, collator) == 0
    ids, row = batch.documents.token_ids.clone(), batch.documents.offsets.tolist()
    visual = (ids == collator.prompter.image_token_id).nonzero().flatten()
    ids[[int(n) for n in visual if n < row[5]]] = 0  # of the first five
    cut = replace(batch, documents=replace(batch.documents, token_ids=ids))
    assert truncated_share(cut, collator) == 5 / 20


def test_an_order_that_is_drawn_anew_seldom_lets_the_same_rows_meet(make_picker, facts_of, shapes):
    facts = facts_of(shapes)
    by_chance = (6 - 1) / (40 - 1)
    assert abs(facts.epoch_overlap - by_chance) < 0.1
    assert abs(facts.neighbours - by_chance) < 0.15


def test_a_fixed_order_is_seen(shapes, facts_of, monkeypatch):
    from colfolio.data import sampler

    monkeypatch.setattr(sampler, "_epoch_order", lambda weights, *_: np.arange(len(weights)))
    facts = facts_of(shapes)
    assert facts.epoch_overlap == 1
    assert facts.neighbours == pytest.approx(5 / 6)


def test_meetings_and_neighbours_are_counted_by_their_definition():
    batches = [[0, 1, 2], [3, 4, 5]]
    assert meeting_again(batches, [[0, 1, 3], [2, 4, 5]]) == 2 / 6
    assert meeting_again(batches, []) == 0
    assert meeting_again([[0], [1]], batches) is None
    assert with_neighbours(batches) == 4 / 6
    assert with_neighbours([[0, 2], [4, 6]]) == 0
    assert with_neighbours([]) is None


@pytest.mark.parametrize(("images", "pixels", "expected"), [(5, 10**9, 5), (99, 20_000, 4)])
def test_no_more_images_are_read_than_the_bound_allows(shapes, images, pixels, expected):
    read = ReadImages(shapes.corpus, images, pixels)
    for _ in range(2):
        read.read(range(40))
    assert len(read.seen) == expected
