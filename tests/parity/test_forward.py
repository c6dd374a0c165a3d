"""Packed equals `transformers` run one by one, forward and backward, all parameters."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from colfolio.data.video import Clip
from colfolio.maxsim import maxsim
from colfolio.training.losses import LossSettings, info_nce

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
BATCHES = ["texts", "pages", "one page", "equal pages", "pages and clips"]


@pytest.fixture(params=FAMILIES)
def retriever(request, make_family_retriever):
    return make_family_retriever(request.param)


def clips():
    """Of different sizes and lengths, one with an odd number of frames."""
    generator = np.random.default_rng(3)
    shapes = [(3, 56, 56), (4, 28, 84)]
    return [Clip(generator.integers(0, 256, (*s, 3), dtype=np.uint8), 0.5) for s in shapes]


def packed_batch(name, retriever, texts, pages):
    packed = {
        "texts": lambda: retriever.collator.queries(texts),
        "pages": lambda: retriever.collator.documents(pages),
        "one page": lambda: retriever.collator.documents(pages[3:4]),
        "equal pages": lambda: retriever.collator.documents(pages[4:6]),
        "pages and clips": lambda: retriever.collator.documents([pages[0], *clips(), pages[3]]),
    }[name]()
    dtype = retriever.projection.weight.dtype
    return dataclasses.replace(packed, patches=packed.patches.to(dtype))


def random_weights(vectors):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype)


def assert_equal_gradients(mine, plain, share):
    assert mine.keys() == plain.keys()
    total = torch.stack([gradient.norm() for gradient in plain.values()]).norm()
    for name, gradient in plain.items():
        difference = (mine[name] - gradient).norm()
        # a parameter without influence has a gradient of rounding errors alone
        bound = share * max(gradient.norm(), 1e-6 * total)
        assert difference <= bound, f"{name}: {difference} of {gradient.norm()}"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch", BATCHES)
def test_packed_equals_one_by_one_in_float32(
    batch, attention, retriever, plain_model, own_gradients, texts, pages
):
    packed = packed_batch(batch, retriever, texts, pages)
    plain = plain_model(retriever, attention)
    mine, theirs = retriever(packed).vectors, plain.vectors(packed)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    (mine * random_weights(mine)).sum().backward()
    (theirs * random_weights(mine)).sum().backward()
    assert_equal_gradients(own_gradients(retriever), plain.gradients(), 2e-5)


@pytest.mark.parametrize("batch", BATCHES)
def test_packed_equals_one_by_one_in_float64(
    batch, retriever, plain_model, own_gradients, texts, pages
):
    retriever.to(torch.float64)
    packed = packed_batch(batch, retriever, texts, pages)
    plain = plain_model(retriever, "sdpa")  # eager rounds its softmax to float32
    mine, theirs = retriever(packed).vectors, plain.vectors(packed)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    (mine * random_weights(mine)).sum().backward()
    (theirs * random_weights(mine)).sum().backward()
    assert_equal_gradients(own_gradients(retriever), plain.gradients(), 1e-10)


def test_a_mixed_batch_equals_one_by_one_through_scores_and_loss(
    retriever, plain_model, own_gradients, texts, pages
):
    retriever.to(torch.float64)
    plain = plain_model(retriever, "sdpa")
    queries = packed_batch("texts", retriever, texts, pages)
    documents = packed_batch("pages", retriever, texts, pages)
    positives = torch.eye(len(texts), len(pages), dtype=torch.bool)
    losses = []
    for vectors in (retriever, lambda side: _as_rows(plain.vectors(side), side)):
        scores = maxsim(vectors(queries), vectors(documents))
        loss = info_nce(scores, positives, torch.zeros_like(positives), LossSettings()).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    assert_equal_gradients(own_gradients(retriever), plain.gradients(), 1e-10)


def test_a_row_that_saw_its_neighbour_would_be_caught(retriever, plain_model, texts, monkeypatch):
    packed = retriever.collator.queries(texts)

    def one_long_row(*args, **kwargs):
        whole = torch.tensor([0, len(packed.token_ids)])
        return attend(*args, **(kwargs | {"cu_seq_lens_q": whole}))

    attend = AttentionInterface._global_mapping["colfolio_packed"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "colfolio_packed", one_long_row)
    mine = retriever(packed).vectors
    assert (mine - plain_model(retriever, "sdpa").vectors(packed)).abs().max() > 1e-2


def test_one_dimensional_positions_of_images_would_be_caught(retriever, plain_model, pages):
    packed = retriever.collator.documents(pages)
    flat = torch.cat([torch.arange(length) for length in packed.lengths.tolist()])
    wrong = dataclasses.replace(packed, position_ids=flat.expand(3, -1))
    mine = retriever(wrong).vectors
    assert (mine - plain_model(retriever, "sdpa").vectors(packed)).abs().max() > 1e-2


def _as_rows(vectors, packed):
    from colfolio.batch import MultiVectors

    return MultiVectors(vectors, packed.offsets)
