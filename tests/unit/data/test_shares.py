"""Ranks share a batch: together they hold what one would, and know who answers whom."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
import torch

from colfolio.data.contrastive import BatchSettings, BatchSource
from colfolio.data.dataset import CorpusRow, Query, load_dataset, write_split
from colfolio.data.sampler import SamplerPosition
from colfolio.distributed import World
from colfolio.errors import DatasetError, DocumentError

START = SamplerPosition()


class Ranks(World):
    """A rank whose companions are threads of this process."""

    def gather_rows(self, rows, gradient):  # noqa: ARG002
        return torch.cat(self.gather_objects(rows))

    def gather_counts(self, count):
        return self.gather_objects(count)

    def gather_objects(self, value):
        self.values[self.rank] = value
        self.meeting.wait(60)
        values = list(self.values)
        self.meeting.wait(60)
        return values


def ranks(size):
    meeting, values = threading.Barrier(size), [None] * size
    for rank in range(size):
        world = Ranks(rank, size)
        object.__setattr__(world, "meeting", meeting)
        object.__setattr__(world, "values", values)
        yield world


@pytest.fixture
def dataset(tmp_path, encode_png):
    """14 pages of 4 documents, 10 queries; some share a page, some have judged negatives."""
    generator = np.random.default_rng(1)
    rows = [
        CorpusRow(
            f"p{n}",
            encode_png(generator.integers(0, 256, (28, 28 * (1 + n % 4), 3), dtype=np.uint8)),
            f"doc{n % 4}",
            n // 4,
        )
        for n in range(14)
    ]
    queries = [Query(f"q{n}", "x" * (n + 1), "") for n in range(10)]
    qrels = {f"q{n}": {f"p{n // 2 * 2}": 1, f"p{(n + 5) % 14}": 1} for n in range(10)}
    for n in (0, 4, 7):
        qrels[f"q{n}"] |= {"p13": 0, "p11": 0}
    write_split(tmp_path / "set", "train", rows, queries, qrels)
    return load_dataset(tmp_path / "set", "train")


def shares(dataset, collator, size, **settings):
    """Of each of some batches, the share of each rank with the masks of all."""
    settings = BatchSettings(rows=7, hard_negatives=2, **settings)
    sources = [BatchSource(dataset, collator, settings, 3, world) for world in ranks(size)]
    with ThreadPoolExecutor(size) as pool:
        for drawn in islice(zip(*(source.batches(START) for source in sources), strict=True), 5):
            asked = [
                pool.submit(source.of_all_ranks, each)
                for source, each in zip(sources, drawn, strict=True)
            ]
            yield [each.result() for each in asked]


def relations(parts):
    """Every pair of query and document of a batch, by their numbers."""
    queries = torch.cat([part.query_ids for part in parts]).tolist()
    documents = torch.cat([part.document_ids for part in parts]).tolist()
    assert len(set(documents)) == len(documents)
    for part in parts:
        assert torch.equal(part.positives, parts[0].positives)
        assert torch.equal(part.ignored, parts[0].ignored)
    marks = (parts[0].positives.int() - parts[0].ignored.int()).tolist()
    return {
        (query, document): marks[row][column]
        for row, query in enumerate(queries)
        for column, document in enumerate(documents)
    }


@pytest.mark.parametrize("copies", ["none", "exact", "near"])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_hold_together_what_one_would(dataset, shared_retriever, size, copies):
    collator = shared_retriever.collator
    alone = shares(dataset, collator, 1, ignore_copies=copies)
    together = shares(dataset, collator, size, ignore_copies=copies)
    for one, many in zip(alone, together, strict=True):
        assert relations(many) == relations(one)
        counts = [len(part.queries) for part in many]
        assert max(counts) - min(counts) <= 1


@pytest.fixture
def damage(dataset, monkeypatch):
    """Makes rows of the corpus undecodable."""
    decode = dataset.corpus.image

    def damage(*rows):
        def image(row):
            if row in rows:
                raise DocumentError("image", "is a damaged image")
            return decode(row)

        monkeypatch.setattr(dataset.corpus, "image", image)

    return damage


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("row", range(14))
def test_a_query_whose_picked_page_no_rank_could_read_is_left_out_as_in_one(
    dataset, shared_retriever, size, row, damage
):
    damage(row)
    collator = shared_retriever.collator
    alone, together = (shares(dataset, collator, ranks) for ranks in (1, size))
    for one, many in zip(alone, together, strict=True):
        assert relations(many) == relations(one)
        for part in many:
            assert len(part.queries) == len(part.query_ids)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_images_that_several_ranks_cannot_read_are_counted_together(
    dataset, shared_retriever, size, damage
):
    damage(4, 8)
    with pytest.raises(
        DatasetError, match=r"2 of \d+ images.*'p[48]': is a damaged image; 'p[48]'"
    ):
        list(shares(dataset, shared_retriever.collator, size))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_image_that_cannot_be_read_stops_no_rank(dataset, shared_retriever, size, damage):
    damage(4)
    assert len(list(shares(dataset, shared_retriever.collator, size))) == 5


def test_a_rank_reads_no_page_of_another(dataset, shared_retriever, monkeypatch):
    read = []
    decode = dataset.corpus.image
    monkeypatch.setattr(dataset.corpus, "image", lambda row: read.append(row) or decode(row))
    for parts in shares(dataset, shared_retriever.collator, 3):
        assert sorted(read) == sorted(torch.cat([part.document_ids for part in parts]).tolist())
        read.clear()


def test_an_image_that_is_there_twice_is_no_negative_of_itself(
    tmp_path, encode_png, shared_retriever
):
    generator = np.random.default_rng(0)
    page, other = (encode_png(generator.integers(0, 256, (56, 56, 3), np.uint8)) for _ in range(2))
    rows = [
        CorpusRow(name, image, name, 0) for name, image in (("a", page), ("b", page), ("c", other))
    ]
    queries = [Query(name, name * 3, "") for name in "abc"]
    qrels = {name: {name: 1} for name in "abc"}
    write_split(tmp_path / "set", "train", rows, queries, qrels)
    dataset = load_dataset(tmp_path / "set", "train")
    for copies, ignored in (("none", 0), ("exact", 2), ("near", 2)):
        settings = BatchSettings(rows=3, ignore_copies=copies)
        source = BatchSource(dataset, shared_retriever.collator, settings, 0)
        batch = next(source.batches(START)).batch
        assert batch.ignored.sum() == ignored, copies


def test_another_scan_of_a_page_is_a_near_copy_and_another_page_is_not(
    tmp_path, encode_png, shared_retriever, drawn_page
):
    scan = np.clip(drawn_page(0).astype(int) + 9, 0, 255).astype(np.uint8)
    images = {"a": drawn_page(0), "b": scan, "c": drawn_page(1)}
    rows = [CorpusRow(name, encode_png(image), name, 0) for name, image in images.items()]
    queries = [Query(name, name * 3, "") for name in "abc"]
    write_split(tmp_path / "set", "train", rows, queries, {name: {name: 1} for name in "abc"})
    dataset = load_dataset(tmp_path / "set", "train")
    for copies, ignored in (("exact", 0), ("near", 2)):
        settings = BatchSettings(rows=3, ignore_copies=copies)
        source = BatchSource(dataset, shared_retriever.collator, settings, 0)
        assert next(source.batches(START)).batch.ignored.sum() == ignored, copies


@pytest.fixture
def drawn_page():
    """A page of black words on white, other ones for each seed."""

    def drawn_page(seed):
        generator = np.random.default_rng(seed)
        page = np.full((224, 168, 3), 246, dtype=np.uint8)
        for top in range(16, 208, 12):
            for left in range(12, 150, 14):
                page[top : top + 7, left : left + int(generator.integers(3, 13))] = 20
        return page

    return drawn_page
