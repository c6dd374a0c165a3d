from itertools import islice

import numpy as np
import pytest
import torch

from colfolio.data.contrastive import BatchSettings, BatchSource
from colfolio.data.dataset import CorpusRow, Query, load_dataset, write_split
from colfolio.data.sampler import SamplerPosition
from colfolio.errors import ColfolioError, DatasetError, DocumentError

START = SamplerPosition()


@pytest.fixture
def write(tmp_path, encode_png):
    """Writes a split from `{corpus id: (document, page)}` and `{text: {corpus id: score}}`.

    Image n by name is one token high and n + 1 tokens wide, so that a row of a batch tells its
    document.
    """

    def write(corpus, queries, kinds=None):
        rows = [
            CorpusRow(
                name, encode_png(np.full((28, width_of(name, corpus), 3), 255, np.uint8)), *place
            )
            for name, place in corpus.items()
        ]
        asked = [
            Query(f"q{n}", text.rstrip("'"), (kinds or {}).get(text, ""))
            for n, text in enumerate(queries)
        ]
        qrels = {f"q{n}": scores for n, scores in enumerate(queries.values())}
        write_split(tmp_path / "set", "train", rows, asked, qrels)
        return load_dataset(tmp_path / "set", "train")

    return write


def width_of(name, corpus):
    return 28 * (sorted(corpus).index(name) + 1)


@pytest.fixture
def first_batch(shared_retriever):
    """The first batch as `{text: {corpus id: "+", "-" or "ignored"}}`."""

    def first_batch(dataset, **settings):
        source = BatchSource(dataset, shared_retriever.collator, BatchSettings(**settings), 0)
        batch = next(source.batches(START)).batch
        widths = (batch.documents.grid_thw[:, 2] // 2 - 1).tolist()
        names = [sorted(dataset.corpus.ids)[width] for width in widths]
        rows = batch.queries.token_ids.split(batch.queries.lengths.tolist())
        prompter = shared_retriever.collator.prompter
        text_of = {tuple(prompter.query_ids([q.text])[0]): q.text for q in dataset.queries}
        marks = {}
        for row, ids in enumerate(rows):
            marks[text_of[tuple(ids.tolist())]] = {
                name: "+"
                if batch.positives[row, column]
                else "ignored"
                if batch.ignored[row, column]
                else "-"
                for column, name in enumerate(names)
            }
        return marks

    return first_batch


def test_the_positive_of_another_query_is_a_positive_where_it_answers_too(write, first_batch):
    corpus = {"a": ("one", 0), "b": ("two", 0), "c": ("three", 0)}
    dataset = write(corpus, {"x": {"a": 1}, "xy": {"b": 1, "a": 1}, "xyz": {"c": 1}})
    marks = first_batch(dataset, rows=3)
    assert marks["x"]["a"] == "+"
    assert marks["xy"]["a"] == "+"
    assert marks["xyz"] == {"a": "-", "c": "+"} | ({"b": "-"} if "b" in marks["x"] else {})


def test_queries_of_equal_text_share_their_positives(write, first_batch):
    corpus = {"a": ("one", 0), "b": ("two", 0), "c": ("three", 0)}
    dataset = write(corpus, {"x": {"a": 1}, "x'": {"b": 1}, "xy": {"c": 1}})
    marks = first_batch(dataset, rows=3)
    assert marks["x"] == {"a": "+", "b": "+", "c": "-"}


def test_queries_that_differ_in_case_alone_share_their_positives(write, first_batch):
    corpus = {"a": ("one", 0), "b": ("two", 0), "c": ("three", 0)}
    dataset = write(corpus, {"Scope": {"a": 1}, "SCOPE": {"b": 1}, "xy": {"c": 1}})
    marks = first_batch(dataset, rows=3)
    # the tiny tokenizer lowers case, so both texts are one key here
    assert marks["SCOPE"] == {"a": "+", "b": "+", "c": "-"}


def test_another_view_of_the_same_page_is_no_negative(write, first_batch):
    corpus = {"a": ("one", 0), "b": ("one", 0), "c": ("one", 1), "d": ("two", 0)}
    queries = {"x": {"a": 1}, "xy": {"b": 1}, "xyz": {"c": 1}, "xyzz": {"d": 1}}
    marks = first_batch(write(corpus, queries), rows=4)
    assert marks["x"] == {"a": "+", "b": "ignored", "c": "-", "d": "-"}
    assert marks["xy"] == {"a": "ignored", "b": "+", "c": "-", "d": "-"}
    assert marks["xyzz"] == {"a": "-", "b": "-", "c": "-", "d": "+"}


def test_the_whole_document_or_nothing_can_be_ignored(write, first_batch):
    corpus = {"a": ("one", 0), "b": ("one", 1), "c": ("two", 1)}
    dataset = write(corpus, {"x": {"a": 1}, "xy": {"b": 1}, "xyz": {"c": 1}})
    assert first_batch(dataset, rows=3, ignore="document")["x"]["b"] == "ignored"
    assert first_batch(dataset, rows=3, ignore="none")["x"]["b"] == "-"


def test_a_view_of_any_positive_page_is_no_negative_whichever_was_picked(write, first_batch):
    corpus = {"a": ("one", 0), "b": ("two", 0), "a2": ("one", 0), "b2": ("two", 0)}
    dataset = write(corpus, {"x": {"a": 1, "b": 1}, "xy": {"a2": 1}, "xyz": {"b2": 1}})
    marks = first_batch(dataset, rows=3)["x"]
    assert marks["a2"] == "ignored"
    assert marks["b2"] == "ignored"


def test_pages_of_unknown_number_are_not_the_same_page(tmp_path, first_batch, encode_png):
    folder = tmp_path / "csv"
    folder.mkdir()
    lines = ["query,image"]
    for number in range(3):
        image = np.full((28, 28 * (number + 1), 3), 255, np.uint8)
        (folder / f"{number}.png").write_bytes(encode_png(image))
        lines.append(f"{'x' * (number + 1)},{number}.png")
    (folder / "set.csv").write_text("\n".join(lines) + "\n")
    marks = first_batch(load_dataset(folder / "set.csv", "train"), rows=3)
    assert all(sorted(row.values()) == ["+", "-", "-"] for row in marks.values())


def test_a_judged_negative_comes_along_and_is_a_negative_even_on_the_page_of_the_positive(
    write, first_batch
):
    corpus = {"a": ("one", 0), "n": ("one", 0), "d": ("one", 0), "b": ("two", 0)}
    dataset = write(corpus, {"x": {"a": 1, "n": 0}, "xy": {"b": 1}, "xyz": {"d": 1}})
    marks = first_batch(dataset, rows=3)
    assert marks["x"] == {"a": "+", "n": "-", "d": "ignored", "b": "-"}
    assert marks["xy"] == {"a": "-", "n": "-", "d": "-", "b": "+"}
    assert marks["xyz"] == {"a": "ignored", "n": "ignored", "d": "+", "b": "-"}


def test_the_positive_of_another_query_is_not_ignored_where_it_is_a_judged_negative(
    write, first_batch
):
    corpus = {"a": ("one", 0), "b": ("one", 0), "c": ("two", 0)}
    queries = {"x": {"a": 1, "b": 0}, "xy": {"b": 1}, "xyz": {"c": 1}}
    marks = first_batch(write(corpus, queries), rows=3)
    assert marks["x"] == {"a": "+", "b": "-", "c": "-"}
    assert marks["xy"] == {"a": "ignored", "b": "+", "c": "-"}


def test_a_query_with_nothing_to_be_told_from_sits_out(write, first_batch):
    corpus = {"a": ("one", 0), "b": ("one", 0)}
    marks = first_batch(write(corpus, {"x": {"a": 1, "b": 0}, "xy": {"b": 1}}), rows=2)
    assert marks == {"x": {"a": "+", "b": "-"}, "xy": {"a": "ignored", "b": "ignored"}}


def test_what_answers_a_query_of_equal_text_is_no_judged_negative(write, first_batch):
    corpus = {"a": ("one", 0), "b": ("two", 0), "c": ("three", 0)}
    dataset = write(corpus, {"x": {"a": 1, "b": 0}, "x'": {"b": 1}, "xy": {"c": 1}})
    assert first_batch(dataset, rows=3)["x"] == {"a": "+", "b": "+", "c": "-"}


def test_one_of_the_judged_negatives_is_drawn_for_a_batch_and_each_has_its_turn(
    write, shared_retriever
):
    corpus = {name: (name, 0) for name in "abklmn"}
    judged = {"a": 1, "k": 0, "l": 0, "m": 0, "n": 0}
    dataset = write(corpus, {"x": judged, "xy": {"b": 1}})
    source = BatchSource(dataset, shared_retriever.collator, BatchSettings(rows=2), 0)
    came = set()
    for drawn in islice(source.batches(START), 24):
        widths = (drawn.batch.documents.grid_thw[:, 2] // 2).tolist()
        assert len(widths) == 3
        came.update(widths)
    assert came == {1, 2, 3, 4, 5, 6}


def test_judged_negatives_change_no_other_draw(write, shared_retriever):
    corpus = {name: (name, 0) for name in "abcdefyz"}
    plain = {"X": {"a": 1, "b": 1}, "Xy": {"c": 1, "d": 1}, "Xyz": {"e": 1, "f": 1}}
    judged = {"X": plain["X"] | {"y": 0, "z": 0}} | dict(list(plain.items())[1:])
    settings = BatchSettings(rows=3, lowercase_share=0.5)
    batches = []
    for queries in (plain, judged):
        source = BatchSource(write(corpus, queries), shared_retriever.collator, settings, 0)
        batches.append([drawn.batch for drawn in islice(source.batches(START), 8)])
    for mine, theirs in zip(*batches, strict=True):
        assert torch.equal(mine.queries.token_ids, theirs.queries.token_ids)
        assert torch.equal(mine.documents.grid_thw, theirs.documents.grid_thw[:-1])
        assert torch.equal(mine.positives, theirs.positives[:, :-1])


@pytest.fixture
def damage(monkeypatch):
    """Makes images of a dataset undecodable, by corpus id."""

    def damage(dataset, *names):
        decode = dataset.corpus.image

        def image(row):
            if dataset.corpus.ids[row] in names:
                raise DocumentError("image", "is a damaged image")
            return decode(row)

        monkeypatch.setattr(dataset.corpus, "image", image)
        return dataset

    return damage


def test_a_damaged_image_leaves_the_batch_with_its_query_and_is_remembered(
    write, shared_retriever, damage
):
    corpus = {name: (name, 0) for name in "abcn"}
    queries = {"x": {"a": 1}, "xy": {"b": 1, "n": 0}, "xyz": {"c": 1}}
    dataset = damage(write(corpus, queries), "a")
    source = BatchSource(dataset, shared_retriever.collator, BatchSettings(rows=3), 0)
    for drawn in islice(source.batches(START), 4):
        assert (drawn.batch.documents.grid_thw[:, 2] // 2).tolist() == [2, 3, 4]
        assert drawn.batch.positives.tolist() == [[True, False, False], [False, True, False]]
    assert source.unreadable == {"a": "is a damaged image"}


def test_a_damaged_judged_negative_leaves_its_query_in_the_batch(write, shared_retriever, damage):
    queries = {"x": {"a": 1, "n": 0}, "xy": {"b": 1}}
    dataset = damage(write({name: (name, 0) for name in "abn"}, queries), "n")
    source = BatchSource(dataset, shared_retriever.collator, BatchSettings(rows=2), 0)
    batch = next(source.batches(START)).batch
    assert batch.positives.tolist() == [[True, False], [False, True]]
    assert list(source.unreadable) == ["n"]


def test_damaged_images_are_an_error_once_they_are_two_and_more_than_a_hundredth(
    write, shared_retriever, damage
):
    names = "abcdef"
    queries = {"x" * (number + 1): {name: 1} for number, name in enumerate(names)}
    dataset = damage(write({name: (name, 0) for name in names}, queries), "b", "e")
    source = BatchSource(dataset, shared_retriever.collator, BatchSettings(rows=6), 0)
    with pytest.raises(DatasetError, match=r"set, .*2 of 6 .*'b': is a damaged image"):
        next(source.batches(START))


def test_two_damaged_images_of_two_hundred_stop_nothing(write, shared_retriever, damage):
    corpus = {f"{number:03d}": (str(number), 0) for number in range(6)}
    queries = {"x" * (number + 1): {name: 1} for number, name in enumerate(corpus)}
    dataset = damage(write(corpus, queries), "000", "003")
    source = BatchSource(dataset, shared_retriever.collator, BatchSettings(rows=6), 0)
    source._tried.update(range(200))
    assert len(next(source.batches(START)).batch.queries) == 4


def test_a_batch_without_a_readable_image_is_an_error(write, shared_retriever, damage):
    dataset = damage(write({"a": ("a", 0)}, {"x": {"a": 1}, "xy": {"a": 1}}), "a")
    source = BatchSource(dataset, shared_retriever.collator, BatchSettings(rows=2), 0)
    with pytest.raises(DatasetError, match=r"1 of 1 .*'a': is a damaged image"):
        next(source.batches(START))


@pytest.fixture
def crowded(write):
    """12 images on 6 pages, 9 queries with one to three positives."""
    names = "abcdefghijkl"
    corpus = {name: (f"doc{n // 4}", n // 2 % 2) for n, name in enumerate(names)}
    generator = np.random.default_rng(0)
    queries = {
        "x" * (n + 1): {str(name): 1 for name in generator.choice(list(names), 1 + n % 3, False)}
        for n in range(9)
    }
    return write(corpus, queries)


@pytest.mark.parametrize("ignore", ["page", "document", "none"])
def test_a_document_is_never_positive_and_ignored_and_a_query_has_a_positive_or_sits_out(
    crowded, shared_retriever, ignore
):
    settings = BatchSettings(rows=4, ignore=ignore)
    source = BatchSource(crowded, shared_retriever.collator, settings, 0)
    for drawn in islice(source.batches(START), 12):
        batch = drawn.batch
        assert not (batch.positives & batch.ignored).any()
        sits_out = batch.ignored.all(dim=1)
        assert torch.equal(batch.positives.any(dim=1), ~sits_out)
        negatives = ~(batch.positives | batch.ignored)
        assert torch.equal(negatives.any(dim=1), ~sits_out)
        assert batch.positives.shape == (len(batch.queries), len(batch.documents))


def test_the_order_in_which_a_dataset_is_stored_decides_no_mask(write, first_batch):
    corpus = {"a": ("one", 0), "b": ("one", 0), "c": ("two", 1), "d": ("two", 1), "e": ("two", 2)}
    queries = {"x" * (n + 1): {name: 1} for n, name in enumerate(corpus)}
    marks = [
        first_batch(write(dict(ordered), queries), rows=5)
        for ordered in (corpus.items(), reversed(corpus.items()))
    ]
    assert marks[0] == marks[1]
    assert marks[0]["x"] == {"a": "+", "b": "ignored", "c": "-", "d": "-", "e": "-"}


def test_a_document_stands_in_a_batch_once(crowded, shared_retriever):
    source = BatchSource(crowded, shared_retriever.collator, BatchSettings(rows=9), 0)
    widths = next(source.batches(START)).batch.documents.grid_thw[:, 2].tolist()
    assert len(set(widths)) == len(widths) <= 9


def test_rows_stand_in_order_of_length_so_that_equal_ones_share_a_call(crowded, shared_retriever):
    source = BatchSource(crowded, shared_retriever.collator, BatchSettings(rows=9), 0)
    batch = next(source.batches(START)).batch
    for side in (batch.queries, batch.documents):
        assert side.lengths.tolist() == sorted(side.lengths.tolist())


def test_batches_go_on_from_a_position_as_if_never_stopped(crowded, shared_retriever):
    source = BatchSource(crowded, shared_retriever.collator, BatchSettings(rows=4), 7)
    whole = list(islice(source.batches(START), 6))
    tail = list(islice(source.batches(whole[2].after), 3))
    for mine, theirs in zip(tail, whole[3:], strict=True):
        assert mine.after == theirs.after
        assert torch.equal(mine.batch.queries.token_ids, theirs.batch.queries.token_ids)
        assert torch.equal(mine.batch.documents.patches, theirs.batch.documents.patches)
        assert torch.equal(mine.batch.positives, theirs.batch.positives)


def test_the_weight_of_a_kind_is_its_share_of_an_epoch(write, shared_retriever):
    corpus = {name: (name, 0) for name in "abcd"}
    queries = {"x": {"a": 1}, "xy": {"b": 1}, "xyz": {"c": 1}, "xyzz": {"d": 1}}
    dataset = write(corpus, queries, {"x": "words", "xy": "words"})
    settings = BatchSettings(rows=2, kind_weights={"words": 0.0})
    source = BatchSource(dataset, shared_retriever.collator, settings, 0)
    for drawn in islice(source.batches(START), 5):
        assert (drawn.batch.documents.grid_thw[:, 2] // 2).tolist() == [3, 4]


@pytest.mark.parametrize(("share", "expected"), [(0.0, {"Ab"}), (1.0, {"ab"}), (0.5, {"Ab", "ab"})])
def test_a_share_of_the_queries_is_asked_in_lower_case(
    write, shared_retriever, monkeypatch, share, expected
):
    corpus = {name: (name, 0) for name in "abcd"}
    dataset = write(corpus, {f"Ab{number}": {name: 1} for number, name in enumerate(corpus)})
    asked = []
    pack = type(shared_retriever.collator).queries
    monkeypatch.setattr(
        type(shared_retriever.collator), "queries", lambda s, t: asked.extend(t) or pack(s, t)
    )
    settings = BatchSettings(rows=4, lowercase_share=share)
    source = BatchSource(dataset, shared_retriever.collator, settings, 0)
    list(islice(source.batches(START), 8))
    assert {text[:2] for text in asked} == expected


def test_a_weight_for_a_kind_that_no_query_has_is_refused(write, shared_retriever):
    dataset = write({"a": ("a", 0), "b": ("b", 0)}, {"x": {"a": 1}, "xy": {"b": 1}}, {"x": "words"})
    with pytest.raises(ColfolioError, match=r"'word'.*words"):
        BatchSource(
            dataset, shared_retriever.collator, BatchSettings(rows=2, kind_weights={"word": 0.5}), 0
        )


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        BatchSettings(kind_weights={"words": -1.0})


def test_queries_keep_case_until_their_epoch_and_then_lose_it(write, shared_retriever, monkeypatch):
    dataset = write({"a": ("x", 0), "b": ("y", 0)}, {"Alpha": {"a": 1}, "Beta": {"b": 1}})
    asked = []
    collator = type(shared_retriever.collator)
    pack = collator.queries
    monkeypatch.setattr(collator, "queries", lambda s, texts: asked.append(texts) or pack(s, texts))
    settings = BatchSettings(rows=2, lowercase_share=1.0, lowercase_from_epoch=1)
    source = BatchSource(dataset, shared_retriever.collator, settings, 0)
    list(islice(source.batches(START), 2))
    assert [sorted(texts) for texts in asked] == [["Alpha", "Beta"], ["alpha", "beta"]]
