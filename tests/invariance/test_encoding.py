"""What must not matter for the vectors of a text or a page: company, order, call size, process."""

import numpy as np
import pytest
import torch

from colfolio.batch import MultiVectors
from colfolio.models import Retriever


def assert_equal_rows(mine, theirs, tolerance=1e-5):
    assert mine.lengths.tolist() == theirs.lengths.tolist()
    torch.testing.assert_close(mine.vectors, theirs.vectors, rtol=0, atol=tolerance)


def one_by_one(encode, inputs):
    return MultiVectors.cat([encode([each]) for each in inputs])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_the_call_size_never_changes_a_vector(shared_retriever, texts, pages, batch_size):
    for encode, inputs in (
        (shared_retriever.encode_queries, texts),
        (shared_retriever.encode_documents, pages),
    ):
        assert_equal_rows(encode(inputs, batch_size=batch_size), one_by_one(encode, inputs))


@pytest.mark.parametrize("seed", range(3))
def test_order_and_company_never_change_a_vector(shared_retriever, texts, pages, seed):
    generator = np.random.default_rng(seed)
    for encode, inputs in (
        (shared_retriever.encode_queries, texts),
        (shared_retriever.encode_documents, pages),
    ):
        order = generator.permutation(len(inputs)).tolist()
        shuffled = encode([inputs[row] for row in order])
        assert_equal_rows(shuffled, one_by_one(encode, inputs).select(order))
        some = order[: len(inputs) // 2]
        assert_equal_rows(encode([inputs[row] for row in some]), encode(inputs).select(some))


def test_packing_in_any_order_gives_each_row_the_same_vectors(shared_retriever, texts, pages):
    # unlike `encode`, a batch of the trainer is not sorted by the model
    collator = shared_retriever.collator
    for pack, inputs in ((collator.queries, texts), (collator.documents, pages)):
        with torch.no_grad():
            forwards = shared_retriever(pack(inputs))
            backwards = shared_retriever(pack(inputs[::-1]))
        last_to_first = list(range(len(inputs)))[::-1]
        assert_equal_rows(backwards.select(last_to_first), forwards)


def test_a_neighbour_of_any_content_never_changes_a_vector(shared_retriever, pages, random_image):
    first = shared_retriever.encode_documents([pages[0], pages[4]])
    other = shared_retriever.encode_documents([pages[0], random_image(84, 56, seed=9)])
    torch.testing.assert_close(first[0], other[0], rtol=0, atol=1e-6)


def test_saving_and_loading_changes_no_bit(shared_retriever, texts, pages, tmp_path):
    shared_retriever.save_pretrained(tmp_path / "model")
    loaded = Retriever.from_pretrained(tmp_path / "model")
    for name, inputs in (("encode_queries", texts), ("encode_documents", pages)):
        mine, theirs = getattr(loaded, name)(inputs), getattr(shared_retriever, name)(inputs)
        assert torch.equal(mine.vectors, theirs.vectors)


def test_two_retrievers_in_one_process_do_not_share_anything(make_retriever, texts, pages):
    first = make_retriever(seed=0).eval()
    before = first.encode_queries(texts).vectors, first.encode_documents(pages).vectors
    make_retriever(seed=1).eval().encode_documents(pages)
    after = first.encode_queries(texts).vectors, first.encode_documents(pages).vectors
    for mine, theirs in zip(after, before, strict=True):
        assert torch.equal(mine, theirs)


def test_a_plain_backbone_of_the_library_works_beside_ours(shared_retriever, texts):
    # our attention is registered for the whole process: others must go on as before
    import copy

    from transformers import Qwen2VLModel

    config = copy.deepcopy(shared_retriever.backbone.config)
    config._attn_implementation = config.text_config._attn_implementation = "sdpa"
    plain = Qwen2VLModel(config).eval()
    ids = shared_retriever.collator.queries(texts).token_ids[None]
    assert plain(input_ids=ids).last_hidden_state.isfinite().all()
