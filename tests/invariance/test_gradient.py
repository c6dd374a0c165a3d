"""What must not matter for the gradient: packing, order, gradient checkpointing, attention path."""

import pytest
import torch

from colfolio import attention
from colfolio.maxsim import maxsim


@pytest.fixture
def gradients(retriever):
    """Gradients of all parameters for a weighted sum of the vectors of each packed input."""

    def gradients(packed_inputs, weights):
        retriever.zero_grad()
        for packed, weight in zip(packed_inputs, weights, strict=True):
            (retriever(packed).vectors * weight).sum().backward()
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in retriever.named_parameters()
        }

    return gradients


def assert_close(mine, theirs, share):
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        difference = (mine[name] - gradient).norm()
        assert difference <= share * max(gradient.norm(), 1e-6 * total), name


def weights_of(retriever, packed):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(packed.token_ids), retriever.dim, generator=generator)


@pytest.mark.parametrize("side", ["queries", "documents"])
def test_batch_composition_never_changes_the_gradient(retriever, gradients, texts, pages, side):
    inputs = texts if side == "queries" else pages
    pack = getattr(retriever.collator, side)
    together = pack(inputs)
    weights = weights_of(retriever, together)
    whole = gradients([together], [weights])
    alone = gradients([pack([each]) for each in inputs], weights.split(together.lengths.tolist()))
    assert_close(alone, whole, 1e-5)
    in_pairs = [pack(inputs[begin : begin + 2]) for begin in range(0, len(inputs), 2)]
    of_pairs = weights.split([len(packed.token_ids) for packed in in_pairs])
    assert_close(gradients(in_pairs, of_pairs), whole, 1e-5)


def test_gradient_checkpointing_changes_no_vector_and_no_gradient(make_retriever, texts, pages):
    results = []
    for is_on in (False, True):
        retriever = make_retriever().train()
        if is_on:
            retriever.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        queries = retriever(retriever.collator.queries(texts))
        documents = retriever(retriever.collator.documents(pages))
        scores = maxsim(queries, documents)
        scores.logsumexp(dim=1).sum().backward()
        gradients = {name: weight.grad for name, weight in retriever.named_parameters()}
        results.append((scores.detach(), gradients))
    (scores, plain), (again, checkpointed) = results
    torch.testing.assert_close(again, scores, rtol=0, atol=1e-6)
    assert_close(checkpointed, plain, 1e-6)


def test_gradient_checkpointing_really_keeps_less(make_retriever, pages):
    kept = []
    for is_on in (False, True):
        retriever = make_retriever().train()
        if is_on:
            retriever.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda x: x
        ):
            retriever(retriever.collator.documents(pages))
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("short", [0, 64, 1 << 20])
def test_which_attention_path_a_length_takes_never_changes_the_gradient(
    retriever, gradients, texts, pages, monkeypatch, short
):
    packed = [retriever.collator.queries(texts), retriever.collator.documents(pages)]
    weights = [weights_of(retriever, each) for each in packed]
    whole = gradients(packed, weights)
    monkeypatch.setattr(attention, "_SHORT", short)
    assert_close(gradients(packed, weights), whole, 1e-5)
