"""What is counted before a run is what the run then draws."""

from itertools import islice

import pytest

from colfolio.data.contrastive import BatchSettings, BatchSource
from colfolio.data.dataset import CorpusRow, Query, load_dataset, write_split
from colfolio.data.picks import Picker
from colfolio.data.sampler import SamplerPosition


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
