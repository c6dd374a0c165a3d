"""What must not matter for the vectors of a text or a page: company, order, call size, process."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colfolio.batch import MultiVectors, Packed, offsets_of
from colfolio.data.video import Clip
from colfolio.models import Retriever, base_from_shape

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def any_family(request, tiny_shape_of, tiny_tokenizer):
    """A tiny retriever of each family, that no test changes."""
    return base_from_shape(tiny_shape_of(request.param), tiny_tokenizer, 0).eval()


@pytest.fixture(scope="module")
def half_precision(tiny_shape, tiny_tokenizer):
    """A tiny retriever with weights in bf16, that no test changes."""
    shape = tiny_shape.model_copy(update={"dtype": "bfloat16"})
    return base_from_shape(shape, tiny_tokenizer, 0).eval()


@pytest.fixture(scope="module")
def documents(pages, random_image):
    """Images of several sizes, and clips of several lengths, one of them of a single frame."""
    clips = [
        Clip(np.stack([random_image(*size, seed=frame) for frame in range(count)]), seconds)
        for size, count, seconds in (((56, 84), 5, 0.5), ((28, 28), 1, 1.0), ((84, 56), 4, 0.2))
    ]
    return [*pages, *clips]


@pytest.fixture(scope="module")
def documents_alone(any_family, documents):
    """The vectors of each document, encoded in a call of its own."""
    return one_by_one(any_family.encode_documents, documents)


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


# several documents that may be equal, in any order, and how many of them share a call
compositions = st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 13))


@settings(max_examples=25)
@given(compositions)
def test_no_composition_of_a_call_changes_a_vector_of_any_family(
    any_family, documents, documents_alone, composition
):
    rows, batch_size = composition
    together = any_family.encode_documents([documents[row] for row in rows], batch_size=batch_size)
    assert_equal_rows(together, documents_alone.select(rows))


def test_company_in_bf16_changes_a_vector_no_more_than_its_rounding_does(
    half_precision, shared_retriever, documents
):
    exact = one_by_one(shared_retriever.encode_documents, documents)
    alone = one_by_one(half_precision.encode_documents, documents)
    rounding = float((alone.vectors - exact.vectors).abs().max())
    for batch_size in (2, 3, 64):
        together = half_precision.encode_documents(documents, batch_size=batch_size)
        assert_equal_rows(together, alone, tolerance=rounding)


def test_texts_pages_and_clips_in_one_call_of_the_model_do_not_meet(
    any_family, documents, documents_alone, texts
):
    queries = any_family.collator.queries(texts[:3])
    shown = any_family.collator.documents([documents[row] for row in (0, 7, 3)])
    order = [(queries, 0), (shown, 0), (shown, 1), (queries, 1), (shown, 2), (queries, 2)]
    with torch.no_grad():
        mixed = any_family(packed_together([side.rows(row, row + 1) for side, row in order]))
    alone = MultiVectors.cat([any_family.encode_queries([text]) for text in texts[:3]])
    assert_equal_rows(mixed.select([0, 3, 5]), alone)
    assert_equal_rows(mixed.select([1, 2, 4]), documents_alone.select([0, 7, 3]))


def packed_together(parts):
    return Packed(
        torch.cat([part.token_ids for part in parts]),
        offsets_of([len(part.token_ids) for part in parts]),
        torch.cat([part.position_ids for part in parts], dim=1),
        torch.cat([part.patches for part in parts]),
        torch.cat([part.grid_thw for part in parts]),
        offsets_of([len(part.grid_thw) for part in parts]),
    )


def test_the_number_of_threads_never_changes_a_vector(
    shared_retriever, texts, documents, restore_threads
):
    for encode, inputs in (
        (shared_retriever.encode_queries, texts),
        (shared_retriever.encode_documents, documents),
    ):
        torch.set_num_threads(1)
        one = encode(inputs)
        torch.set_num_threads(2)
        assert_equal_rows(encode(inputs), one)


def test_encoding_draws_from_no_generator_and_training_mode_changes_nothing(
    make_retriever, texts, documents
):
    retriever = make_retriever(text={"attention_dropout": 0.5}).eval()
    for encode, inputs in (
        (retriever.encode_queries, texts),
        (retriever.encode_documents, documents),
    ):
        retriever.eval()
        evaluated = encode(inputs).vectors
        retriever.train()
        torch.manual_seed(5)
        np.random.seed(5)
        assert torch.equal(encode(inputs).vectors, evaluated)
        drawn = float(torch.rand(())), np.random.random()
        torch.manual_seed(5)
        np.random.seed(5)
        assert drawn == (float(torch.rand(())), np.random.random())


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
