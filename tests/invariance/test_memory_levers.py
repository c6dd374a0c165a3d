"""What saves memory never changes the gradient beyond the rounding of its dtype."""

import pytest
import torch

from colfolio.attention import set_attention
from colfolio.models.checkpoint import cast_parameters
from colfolio.models.gradient_checkpointing import checkpoint_layers
from colfolio.models.precision import autocast
from colfolio.training.dropout import RowDropouts, dropout_keys
from colfolio.training.optim import build_scaler

CPU = torch.device("cpu")
TARGETS = r".*\.(q_proj|v_proj|down_proj|qkv|fc1|mlp\.0)"


@pytest.fixture
def deep(make_retriever):
    """A tiny retriever of four layers in each tower, in training mode."""
    return make_retriever(text={"num_hidden_layers": 4}, vision={"depth": 4}).train()


@pytest.fixture
def adapted(deep):
    """The same with LoRA in both towers, and dropout before each; only LoRA trains."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.2, target_modules=TARGETS)
    cast_parameters(deep, torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        peft.inject_adapter_in_model(config, deep.backbone)
        for name, weight in deep.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)  # 0, as peft draws it, would hide dropout
    cast_parameters(deep, torch.float64)
    deep.projection.requires_grad_(False)
    return deep.train()


@pytest.fixture
def sides(deep, texts, pages):
    return deep.collator.queries(texts), deep.collator.documents(pages)


def gradients(retriever):
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in retriever.named_parameters()
    }


def vector_gradients(retriever, sides):
    """A gradient for each vector, as a loss would give it, but without a winner that may change."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(side.token_ids), retriever.dim) for side in sides]
    return [torch.randn(shape, generator=generator) / 100 for shape in shapes]


def gradient_of(retriever, sides):
    retriever.zero_grad()
    for side, gradient in zip(sides, vector_gradients(retriever, sides), strict=True):
        vectors = retriever(side).vectors
        vectors.backward(gradient.to(vectors))
    return gradients(retriever)


def assert_close(mine, theirs, share):
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).norm() <= share * total, name


def difference(mine, theirs):
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    parts = [(mine[name] - gradient).norm() for name, gradient in theirs.items()]
    return (torch.stack(parts).norm() / total).item()


def held_bytes(retriever, sides):
    """What the graph of a batch holds for backward, weights aside."""
    weights = {weight.untyped_storage().data_ptr() for weight in retriever.parameters()}
    held = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = [retriever(side).vectors for side in sides]
    assert outputs
    return sum(held.values())


@pytest.fixture
def count_layers(deep):
    """How many times each layer ran since it was last asked."""
    layers = {"visual": deep.backbone.visual.blocks, "text": deep.backbone.language_model.layers}
    runs = []
    for tower, blocks in layers.items():
        for block in blocks:
            block.mlp.register_forward_pre_hook(lambda *_, tower=tower: runs.append(tower))

    def count():
        found = {tower: runs.count(tower) for tower in layers}
        runs.clear()
        return found

    return count


@pytest.mark.parametrize("which", ["all", 2, 3])
def test_gradient_checkpointing_changes_no_bit_of_the_gradient(deep, sides, which):
    expected = gradient_of(deep, sides)
    checkpoint_layers(deep.backbone, which)
    for name, gradient in gradient_of(deep, sides).items():
        assert torch.equal(gradient, expected[name]), name


def test_the_more_layers_are_checkpointed_the_less_is_held(deep, sides, count_layers):
    held, runs = [], []
    for which in ("none", 3, 2, "all", "none"):
        checkpoint_layers(deep.backbone, which)
        held.append(held_bytes(deep, sides))
        count_layers()
        gradient_of(deep, sides)
        runs.append(count_layers())
    assert held[:4] == sorted(held[:4], reverse=True)
    assert held[3] < 0.5 * held[0] == 0.5 * held[4]
    # queries and documents go through the text layers, documents alone through the blocks
    assert [run["text"] for run in runs] == [8, 12, 12, 16, 8]
    assert [run["visual"] for run in runs] == [4, 6, 6, 8, 4]


@pytest.mark.parametrize("which", ["all", 2])
def test_frozen_layers_are_never_computed_again(deep, sides, count_layers, which):
    deep.backbone.visual.requires_grad_(False)
    expected = gradient_of(deep, sides)
    count_layers()
    checkpoint_layers(deep.backbone, which)
    for name, gradient in gradient_of(deep, sides).items():
        assert torch.equal(gradient, expected[name]), name
    assert count_layers() == {"visual": 4, "text": 16 if which == "all" else 12}


def test_checkpointed_layers_replay_what_torch_draws(deep, sides):
    for block in deep.backbone.language_model.layers:
        block.mlp.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out, 0.3))
    results = []
    for which in ("none", "all"):
        checkpoint_layers(deep.backbone, which)
        torch.manual_seed(4)
        results.append(gradient_of(deep, sides))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_tower_without_layers_is_refused(deep):
    deep.backbone.visual.blocks = torch.nn.ModuleList()
    with pytest.raises(ValueError, match=r"visual \(.*\) has no layers to checkpoint"):
        checkpoint_layers(deep.backbone, "all")


@pytest.mark.parametrize("choice", ["auto", "sdpa"])
def test_the_attention_kernel_never_changes_the_gradient(deep, sides, choice):
    cast_parameters(deep, torch.float64)
    set_attention(deep.backbone, "eager")
    expected = gradient_of(deep, sides)
    set_attention(deep.backbone, choice)
    assert_close(gradient_of(deep, sides), expected, 1e-12)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_attention_kernel_errs_no_more_than_the_definition_in_half_precision(
    deep, sides, precision
):
    exact = gradient_of(deep, sides)
    errors = {}
    for choice in ("eager", "sdpa"):
        set_attention(deep.backbone, choice)
        with autocast(precision, CPU):
            errors[choice] = difference(gradient_of(deep, sides), exact)
    assert 0 < errors["sdpa"] < 1.5 * errors["eager"]


def through(retriever, sides, precision, factor, scaler):
    """The gradient for small gradients of vectors, which go scaled through half precision."""
    retriever.zero_grad()
    for side, gradient in zip(sides, vector_gradients(retriever, sides), strict=True):
        with autocast(precision, CPU):
            vectors = retriever(side).vectors
        vectors.backward(scaler.scale(gradient * factor))
    scale = scaler.get_scale()
    return {name: each / (factor * scale) for name, each in gradients(retriever).items()}


def test_fp16_errs_by_its_rounding_alone_and_less_than_bf16(deep, sides):
    exact = gradient_of(deep, sides)
    errors = {
        precision: difference(
            through(deep, sides, precision, 1.0, build_scaler(precision, CPU)), exact
        )
        for precision in ("fp16", "bf16")
    }
    # eight layers, each rounding to 2^-11
    assert errors["fp16"] < 16 * 2**-11
    assert errors["fp16"] < 0.5 * errors["bf16"]


def test_gradients_too_small_for_fp16_survive_scaled(deep, sides):
    exact = gradient_of(deep, sides)
    survived = through(deep, sides, "fp16", 1e-4, build_scaler("fp16", CPU))
    assert difference(survived, exact) < 16 * 2**-11
    unscaled = torch.amp.GradScaler("cpu", enabled=False)
    assert difference(through(deep, sides, "fp16", 1e-4, unscaled), exact) > 0.2


def run_rows(retriever, draws, packed, side, rows):
    """The vectors of some rows of a side, which drop what is theirs."""
    chunk = packed.rows(*rows)
    with draws.of(dropout_keys(chunk, torch.arange(*rows), 7, side)):
        return retriever(chunk).vectors


@pytest.mark.parametrize("which", ["none", "all", 2])
@pytest.mark.parametrize("side", ["queries", "documents"])
def test_dropout_never_depends_on_how_rows_are_packed(adapted, sides, side, which):
    packed = sides[side == "documents"]
    draws = RowDropouts(adapted.backbone)
    checkpoint_layers(adapted.backbone, which, draws.contexts)
    weight = torch.randn(len(packed.token_ids), adapted.dim, dtype=torch.float64)
    results = []
    for size in (len(packed), 1, 2):
        adapted.zero_grad()
        chunks = [(row, min(row + size, len(packed))) for row in range(0, len(packed), size)]
        vectors = [run_rows(adapted, draws, packed, side, chunk) for chunk in chunks]
        (torch.cat(vectors) * weight).sum().backward()  # after all chunks have run
        results.append((torch.cat(vectors).detach(), gradients(adapted)))
    whole, expected = results[0]
    for vectors, mine in results[1:]:
        torch.testing.assert_close(vectors, whole, rtol=0, atol=1e-12)
        assert_close(mine, expected, 1e-12)
    assert not torch.allclose(whole, adapted.eval()(packed).vectors)
    assert torch.stack([gradient.norm() for gradient in expected.values()]).norm() > 0


def test_every_adapter_has_a_dropout_of_its_own(adapted):
    draws = RowDropouts(adapted.backbone)
    # q, v and down in four layers; qkv and fc1 in four blocks; one in the merger
    assert len(draws) == 4 * 3 + 4 * 2 + 1
    draws.restore()
    kinds = {type(module).__name__ for module in adapted.modules()}
    assert "Dropout" in kinds
    assert "RowDropout" not in kinds
