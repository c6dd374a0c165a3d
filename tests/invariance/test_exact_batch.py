"""The gradient of a batch is the same however it is cut into chunks and whatever is kept."""

import copy
import dataclasses

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F

from colfolio.batch import ContrastiveBatch
from colfolio.data.video import Clip
from colfolio.errors import RecipeError
from colfolio.maxsim import maxsim
from colfolio.models.checkpoint import cast_parameters
from colfolio.training import graph_budget
from colfolio.training.dropout import RowDropouts
from colfolio.training.exact_batch import ExactBatch, MemorySettings
from colfolio.training.feature_cache import FeatureCache, FeatureCacheSettings
from colfolio.training.frozen_states import row_digests
from colfolio.training.losses import LossSettings, contrastive_loss, info_nce

ONE, TWO = 1, 300  # tokens: every row alone, and a few rows together
SIZES = [ONE, 20, 60, TWO, None]
BUDGETS = [None, 4.0, 6.0, 50.0]  # mebibytes: all graphs, a few, some more, all again
# a chunk that is over a budget by itself is refused
CHUNKS_AND_BUDGETS = [
    *((size, budget) for size in (ONE, 20, 60) for budget in BUDGETS),
    *((size, budget) for size in (TWO, None) for budget in (None, 50.0)),
]
FROZEN = {
    "nothing": [],
    "vision": ["visual"],
    "the first block": ["visual.patch_embed", "visual.blocks.0"],
    "all blocks": ["visual.patch_embed", "visual.blocks"],
    "vision and a layer": ["visual", "language_model.embed_tokens", "language_model.layers.0"],
    "a layer in the middle": ["visual", "language_model.layers.0"],
    "all layers": ["visual", "language_model.embed_tokens", "language_model.layers"],
    "text": ["language_model"],
}
# Where a vision tower reorders patches, or the first text layers add features of its own.
FROZEN_ELSEWHERE = [
    ("qwen2_5_vl", ["visual.patch_embed", "visual.blocks.0"]),
    ("qwen2_5_vl", FROZEN["vision and a layer"]),
    ("qwen3_vl", ["visual.patch_embed", "visual.pos_embed", "visual.blocks"]),
    ("qwen3_vl", ["visual"]),
    ("qwen3_vl", [*FROZEN["vision and a layer"], "language_model.layers.1"]),
]


@pytest.fixture
def clips():
    """Two clips of different sizes and lengths, one of an odd number of frames."""
    generator = np.random.default_rng(3)
    shapes = [(3, 56, 56), (4, 28, 84)]
    return [Clip(generator.integers(0, 256, (*s, 3), dtype=np.uint8), 0.5) for s in shapes]


@pytest.fixture
def batch(retriever, texts, pages, clips):
    return batch_of(retriever, texts, pages, clips)


def batch_of(retriever, texts, pages, clips):
    """Six queries; pages and clips, two of them positives of none, and some are ignored."""
    documents = [*pages, *clips]
    positives = torch.zeros(len(texts), len(documents), dtype=torch.bool)
    positives[range(6), [0, 1, 2, 7, 4, 4]] = True
    positives[0, 8] = True
    ignored = torch.zeros_like(positives)
    ignored[0, 6] = ignored[4, 5] = True
    collator = retriever.collator
    return ContrastiveBatch(
        collator.queries(texts),
        collator.documents(documents),
        positives,
        ignored,
        torch.arange(len(texts)),
        torch.arange(len(documents)),
    )


def loss_of(batch):
    return lambda scores: info_nce(scores, batch.positives, batch.ignored, LossSettings())


def freeze(retriever, parts):
    for part in parts:
        retriever.backbone.get_submodule(part).requires_grad_(False)


def gradients(retriever):
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in retriever.named_parameters()
    }


def plainly(retriever, batch):
    """The definition: everything in one graph."""
    retriever.zero_grad()
    summary = loss_of(batch)(maxsim(retriever(batch.queries), retriever(batch.documents)))
    summary.loss.backward()
    return summary, gradients(retriever)


def exactly(retriever, batch, chunk_tokens=None, activation_mb=None, seed=0, **parts):
    retriever.zero_grad()
    settings = MemorySettings(chunk_tokens=chunk_tokens, activation_mb=activation_mb)
    summary = ExactBatch(retriever, settings, **parts).backward(batch, loss_of(batch), seed)
    return summary, gradients(retriever)


def assert_close(mine, theirs, share):
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).norm() <= share * total, name


@pytest.fixture
def count_runs(retriever):
    """How many times the model ran, without and with graph, since it was last asked."""
    runs = []
    retriever.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))

    def count():
        found = (runs.count(False), runs.count(True))
        runs.clear()
        return found

    return count


@pytest.mark.parametrize(("chunk_tokens", "activation_mb"), CHUNKS_AND_BUDGETS)
def test_chunk_size_and_budget_never_change_the_gradient(
    retriever, batch, chunk_tokens, activation_mb
):
    cast_parameters(retriever, torch.float64)
    plain, expected = plainly(retriever, batch)
    summary, mine = exactly(retriever, batch, chunk_tokens, activation_mb)
    torch.testing.assert_close(summary.loss, plain.loss, rtol=1e-13, atol=0)
    assert_close(mine, expected, 1e-12)


@pytest.mark.parametrize("chunk_tokens", [ONE, 60, None])
@pytest.mark.parametrize("parts", FROZEN.values(), ids=FROZEN)
def test_a_frozen_prefix_never_changes_the_gradient(retriever, batch, parts, chunk_tokens):
    cast_parameters(retriever, torch.float64)
    freeze(retriever, parts)
    _, expected = plainly(retriever, batch)
    for activation_mb in (None, 4.0) if chunk_tokens else (None,):
        _, mine = exactly(retriever, batch, chunk_tokens, activation_mb)
        assert_close(mine, expected, 1e-12)


@pytest.mark.parametrize(("family", "parts"), FROZEN_ELSEWHERE)
def test_a_frozen_prefix_of_any_family_never_changes_the_gradient(
    make_family_retriever, texts, pages, clips, family, parts
):
    other = make_family_retriever(family)
    cast_parameters(other, torch.float64)
    freeze(other, parts)
    batch = with_digests(batch_of(other, texts, pages, clips))
    _, expected = plainly(other, batch)
    cache = FeatureCache(FeatureCacheSettings(ram_mb=0.1), folder=None)
    for chunk_tokens in (ONE, 60, None):
        _, mine = exactly(other, batch, chunk_tokens, cache=cache)
        assert_close(mine, expected, 1e-12)
    assert cache.hits > 0


@pytest.mark.parametrize("activation_mb", [None, 2.0])
@pytest.mark.parametrize("chunk_tokens", [ONE, 60])
@pytest.mark.parametrize("spread", [0.2, 0.05])
def test_in_float32_the_difference_is_that_of_rounding(
    make_retriever, texts, pages, clips, spread, chunk_tokens, activation_mb
):
    drawn = {"initializer_range": spread}
    retriever = make_retriever(text=drawn, vision=drawn)
    batch = batch_of(retriever, texts, pages, clips)
    _, plain = plainly(retriever, batch)
    _, mine = exactly(retriever, batch, chunk_tokens, activation_mb)
    cast_parameters(retriever, torch.float64)
    _, exact = plainly(retriever, batch)
    of_mine, of_plain, apart = (
        torch.stack([(one[name] - other[name]).norm() for name in exact]).norm()
        for one, other in ((mine, exact), (plain, exact), (mine, plain))
    )
    whole = torch.stack([gradient.norm() for gradient in exact.values()]).norm()
    assert 0 < of_mine <= 2 * of_plain
    # so steep that the plain path itself is 1e-5 from the truth, or as models are drawn
    assert apart <= (1e-5 if spread == 0.2 else 1e-6) * whole


@pytest.mark.parametrize("activation_mb", [4.0, 6.0])
def test_a_chunk_that_runs_twice_drops_the_same_both_times(retriever, batch, activation_mb):
    cast_parameters(retriever, torch.float64)
    retriever.backbone.language_model.embed_tokens.register_forward_hook(
        lambda _, __, embedded: F.dropout(embedded, 0.3)
    )
    summary, expected = exactly(retriever, batch, 60, None, seed=3)
    again, mine = exactly(retriever, batch, 60, activation_mb, seed=3)
    assert torch.equal(again.loss, summary.loss)
    assert_close(mine, expected, 1e-12)
    other, _ = exactly(retriever, batch, 60, activation_mb, seed=4)
    assert other.loss != summary.loss


def test_chunks_of_one_side_drop_different_numbers(retriever, batch):
    drawn = []
    retriever.register_forward_hook(lambda *_: drawn.append(float(torch.rand(()))))
    exactly(retriever, batch, ONE)
    assert len(set(drawn)) == len(drawn) == 15


def test_the_generator_of_the_caller_is_left_as_it_was(retriever, batch):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    exactly(retriever, batch, 60, 2.0)
    assert torch.equal(torch.rand(3), expected)


def test_a_batch_that_fits_costs_one_pass(retriever, batch, count_runs):
    for activation_mb in (None, 1e3):
        exactly(retriever, batch, ONE, activation_mb)
        assert count_runs() == (0, 15)


def test_a_budget_keeps_as_many_graphs_as_fit(retriever, batch, count_runs):
    twice = []
    for activation_mb in (1.2, 1.6, 2.5, 1e3):
        exactly(retriever, batch, ONE, activation_mb)
        without, with_graph = count_runs()
        twice.append(without + with_graph - 15)
    assert twice == sorted(twice, reverse=True)
    assert twice[0] > 8
    assert twice[-1] == 0
    assert len(set(twice)) > 2


@pytest.mark.parametrize("chunk_tokens", [ONE, 60, TWO])
def test_no_chunk_has_more_tokens_than_asked_but_one_long_row(retriever, batch, chunk_tokens):
    seen = []
    retriever.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    exactly(retriever, batch, chunk_tokens)
    assert sum(len(packed) for packed in seen) == 15
    for packed in seen:
        assert len(packed) == 1 or len(packed.token_ids) <= chunk_tokens


def test_the_same_graphs_round_alike_whichever_were_kept(retriever, batch):
    _, kept = exactly(retriever, batch, 60, 50.0)
    for activation_mb in (2.0, 3.0):
        _, mine = exactly(retriever, batch, 60, activation_mb)
        for name, gradient in kept.items():
            assert torch.equal(mine[name], gradient), name


class Alive:
    """Storages that autograd holds, counted while it holds them."""

    def __init__(self, known):
        self.known, self.sizes, self.most = known, {}, 0

    def hold(self, tensor):
        return _Held(self, tensor.detach())


class _Held:
    """One saved tensor, which a storage may have several of."""

    def __init__(self, alive, tensor):
        self.alive, self.tensor = alive, tensor
        self.address = tensor.untyped_storage().data_ptr()
        size, times = alive.sizes.get(self.address, (tensor.untyped_storage().nbytes(), 0))
        if self.address not in alive.known:
            alive.sizes[self.address] = size, times + 1
        alive.most = max(alive.most, sum(size for size, _ in alive.sizes.values()))

    def __del__(self):
        size, times = self.alive.sizes.pop(self.address, (0, 0))
        if times > 1:
            self.alive.sizes[self.address] = size, times - 1


@pytest.mark.parametrize("activation_mb", [1.7, 2.0, 2.5])
def test_graphs_never_hold_more_than_the_budget(retriever, batch, activation_mb, monkeypatch):
    known = {weight.untyped_storage().data_ptr() for weight in retriever.parameters()}
    known |= {
        side.patches.untyped_storage().data_ptr() for side in (batch.queries, batch.documents)
    }
    alive = Alive(known)
    hooks = torch.autograd.graph.saved_tensors_hooks

    def both(pack, _unpack):
        """What is measured and what this test counts: of nested hooks only the inner are called."""
        return hooks(lambda tensor: alive.hold(pack(tensor)), lambda held: held.tensor)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", both)
    exactly(retriever, batch, 25, activation_mb)
    assert 0.5 * activation_mb < alive.most / 2**20 <= activation_mb
    assert not alive.sizes


def test_a_chunk_over_the_budget_is_refused_with_the_numbers(retriever, batch):
    with pytest.raises(
        RecipeError, match=r"tokens of documents holds \d.* MiB.*is 0.5.*chunk_tokens"
    ):
        exactly(retriever, batch, None, 0.5)


def test_a_side_in_which_nothing_trains_runs_once(retriever, batch, count_runs):
    freeze(retriever, ["language_model"])
    retriever.projection.requires_grad_(False)
    exactly(retriever, batch, ONE)
    assert count_runs() == (0, 15)


@pytest.mark.parametrize(("chunk_tokens", "activation_mb"), [(ONE, 1.4), (60, None), (None, None)])
def test_in_half_precision_every_chunk_gives_every_weight_its_gradient(
    retriever, batch, chunk_tokens, activation_mb
):
    """All graphs share one copy of each weight, which autocast makes where a gradient is wanted."""
    _, exact = plainly(retriever, batch)
    total = torch.stack([gradient.norm() for gradient in exact.values()]).norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, plain = plainly(retriever, batch)
    _, mine = exactly(retriever, batch, chunk_tokens, activation_mb, precision="bf16")
    error = max((plain[name] - exact[name]).norm() for name in exact)
    for name, gradient in exact.items():
        assert (mine[name] - gradient).norm() <= 1.5 * error, name
        assert mine[name].norm() > 0 or gradient.norm() < 1e-6 * total, name


def test_graphs_in_half_precision_share_their_copies_of_weights(retriever, batch):
    copies, hooks = {}, torch.autograd.graph.saved_tensors_hooks

    def keep(tensor):
        if graph_budget._is_cast_weight(tensor):
            copies.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    def count(chunk_tokens):
        copies.clear()
        with hooks(keep, lambda tensor: tensor):
            exactly(retriever, batch, chunk_tokens, precision="bf16")
        return len(copies)

    assert count(ONE) == count(None) > 20


def test_a_frozen_layer_that_is_replaced_serves_no_old_features(retriever, batch):
    cast_parameters(retriever, torch.float64)
    freeze(retriever, ["visual"])
    cache = FeatureCache(FeatureCacheSettings(ram_mb=50.0), folder=None)
    exact = ExactBatch(retriever, MemorySettings(), cache=cache)
    exact.backward(with_digests(batch), loss_of(batch), 0)
    blocks = retriever.backbone.visual.blocks
    blocks[0] = copy.deepcopy(blocks[1])
    _, expected = plainly(retriever, batch)
    retriever.zero_grad()
    exact.backward(with_digests(batch), loss_of(batch), 0)
    assert_close(gradients(retriever), expected, 1e-12)


@pytest.fixture
def with_lora(retriever):
    """LoRA on all linear layers of the text tower, whose own weights are frozen as all others."""
    retriever.requires_grad_(False)
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.2, target_modules=r".*_proj")
    peft.inject_adapter_in_model(config, retriever.backbone.language_model)
    retriever.projection.requires_grad_(True)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, weight in retriever.named_parameters():
            if "lora_B" in name:  # drawn as zero, it would hide what dropout does
                weight.normal_(generator=generator, std=0.2)
    return retriever.train()


@pytest.mark.parametrize("activation_mb", [None, 8.0])
@pytest.mark.parametrize("chunk_tokens", SIZES)
def test_dropout_draws_alike_in_every_chunk(with_lora, batch, chunk_tokens, activation_mb):
    """The plain path runs everything in one graph, with the same draws of each row."""
    cast_parameters(with_lora, torch.float64)
    dropouts = RowDropouts(with_lora)
    _, expected = exactly(with_lora, batch, seed=3, dropouts=dropouts)
    budget = activation_mb if chunk_tokens in (ONE, 20, 60) else None
    summary, mine = exactly(with_lora, batch, chunk_tokens, budget, seed=3, dropouts=dropouts)
    assert_close(mine, expected, 1e-12)
    other, _ = exactly(with_lora, batch, chunk_tokens, budget, seed=4, dropouts=dropouts)
    assert (other.loss - summary.loss).abs() > 1e-3


def test_what_is_below_the_adapters_runs_once(with_lora, batch):
    """The vision tower is frozen: without a budget for its output alone it would run twice."""
    runs = []
    with_lora.backbone.visual.register_forward_hook(lambda *_: runs.append(1))
    exactly(with_lora, batch, ONE, 1.5, dropouts=RowDropouts(with_lora))
    assert len(runs) == len(batch.documents)


def with_digests(batch):
    return dataclasses.replace(batch, document_digests=row_digests(batch.documents))


@pytest.mark.parametrize("chunk_tokens", [ONE, 60, None])
@pytest.mark.parametrize("parts", list(FROZEN.values())[1:], ids=list(FROZEN)[1:])
def test_a_feature_cache_never_changes_the_gradient(retriever, batch, parts, chunk_tokens):
    cast_parameters(retriever, torch.float64)
    freeze(retriever, parts)
    _, expected = plainly(retriever, batch)
    cache = FeatureCache(FeatureCacheSettings(ram_mb=0.05), folder=None)  # some rows fit, not all
    for _ in range(3):
        _, mine = exactly(retriever, with_digests(batch), chunk_tokens, cache=cache)
        assert_close(mine, expected, 1e-12)
    assert (cache.hits > 0) == (parts != ["language_model"])


def test_cached_features_are_dropped_when_their_part_thaws_or_changes(retriever, batch):
    cast_parameters(retriever, torch.float64)
    freeze(retriever, ["visual"])
    cache = FeatureCache(FeatureCacheSettings(ram_mb=50.0), folder=None)
    exact = ExactBatch(retriever, MemorySettings(), cache=cache)
    marked = with_digests(batch)

    def check():
        _, expected = plainly(retriever, batch)
        retriever.zero_grad()
        exact.backward(marked, loss_of(batch), 0)
        assert_close(gradients(retriever), expected, 1e-12)

    check()
    assert (cache.entries, cache.hits) == (9, 0)
    check()
    assert cache.hits == 9
    with torch.no_grad():
        retriever.backbone.visual.merger.mlp[2].weight.mul_(1.5)
    check()
    assert (cache.entries, cache.hits) == (9, 9)
    retriever.backbone.visual.requires_grad_(True)
    check()
    assert (cache.entries, cache.hits) == (0, 9)


def test_a_cache_over_layers_that_drop_at_random_is_refused(with_lora, batch):
    for name, weight in with_lora.backbone.named_parameters():
        weight.requires_grad_("layers.1" in name and "lora" in name)
    cache = FeatureCache(FeatureCacheSettings(ram_mb=50.0), folder=None)
    with pytest.raises(RecipeError, match=r"lora_dropout.*drops at random \(p=0.2\)"):
        exactly(with_lora, with_digests(batch), cache=cache, dropouts=RowDropouts(with_lora))


@pytest.mark.parametrize("chunk_tokens", [ONE, 60, None])
def test_accumulated_batches_give_their_mean_gradient(retriever, batch, chunk_tokens):
    """Each is compared within itself: accumulation adds no candidates."""
    cast_parameters(retriever, torch.float64)
    halves = [part_of(batch, slice(0, 3), slice(0, 4)), part_of(batch, slice(4, 6), slice(3, 9))]
    each = [plainly(retriever, half)[1] for half in halves]
    expected = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
    retriever.zero_grad()
    exact = ExactBatch(retriever, MemorySettings(chunk_tokens=chunk_tokens))
    for number, half in enumerate(halves):
        summary = exact.backward(half, loss_of(half), number, share=1 / 2)
        assert summary.candidates <= len(half.documents)
    assert_close(gradients(retriever), expected, 1e-12)


def part_of(batch, queries, documents):
    return ContrastiveBatch(
        batch.queries.rows(queries.start, queries.stop),
        batch.documents.rows(documents.start, documents.stop),
        batch.positives[queries, documents],
        batch.ignored[queries, documents],
        batch.query_ids[queries],
        batch.document_ids[documents],
    )


@pytest.mark.parametrize("kind", ["info_nce", "pairwise", "sigmoid"])
def test_every_loss_has_its_exact_gradient(retriever, batch, kind):
    cast_parameters(retriever, torch.float64)
    settings = LossSettings(kind=kind)

    def loss(scores):
        return contrastive_loss(scores, batch.positives, batch.ignored, settings)

    retriever.zero_grad()
    loss(maxsim(retriever(batch.queries), retriever(batch.documents))).loss.backward()
    expected = gradients(retriever)
    retriever.zero_grad()
    ExactBatch(retriever, MemorySettings(chunk_tokens=60, activation_mb=4.0)).backward(
        batch, loss, 0
    )
    assert_close(gradients(retriever), expected, 1e-12)
