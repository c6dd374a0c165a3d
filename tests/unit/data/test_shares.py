"""Ranks share a batch: together they hold what one would, and know who answers whom."""

from itertools import islice

import numpy as np
import pytest
import torch

from colfolio.data.contrastive import BatchSettings, BatchSource
from colfolio.data.dataset import CorpusRow, Query, load_dataset, write_split
from colfolio.data.sampler import SamplerPosition
from colfolio.distributed import World
from colfolio.errors import DocumentError

START = SamplerPosition()


class Ranks(World):
    """A rank whose companions are in this process: what they would send is at hand, in order."""

    def gather_rows(self, rows, gradient):  # noqa: ARG002
        every = next(self.sent)
        assert torch.equal(every[self.rank], rows)
        return torch.cat(every)


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
    sources = [
        BatchSource(dataset, collator, settings, 3, World(rank, size)) for rank in range(size)
    ]
    for drawn in islice(zip(*(source.batches(START) for source in sources), strict=True), 5):
        sent = [
            [each.batch.query_ids for each in drawn],
            [each.batch.document_ids for each in drawn],
        ]
        if settings.ignore_copies != "none":
            words = [torch.from_numpy(each.hashes.words.view(np.int64)) for each in drawn]
            sent = [words, [torch.from_numpy(each.hashes.lengths) for each in drawn], *sent]
        for rank, source in enumerate(sources if size > 1 else []):
            source._world = Ranks(rank, size)
            object.__setattr__(source._world, "sent", iter(sent))
        yield [source.of_all_ranks(each) for source, each in zip(sources, drawn, strict=True)]


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


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_query_whose_page_no_rank_could_read_takes_no_part(
    dataset, shared_retriever, size, monkeypatch
):
    decode = dataset.corpus.image

    def image(row):
        if row == 4:
            raise DocumentError("image", "is a damaged image")
        return decode(row)

    monkeypatch.setattr(dataset.corpus, "image", image)
    for parts in shares(dataset, shared_retriever.collator, size):
        answered = parts[0].positives.any(dim=1)
        assert 4 not in torch.cat([part.document_ids for part in parts])
        assert parts[0].ignored[~answered].all()
        assert answered.sum() >= 5


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
