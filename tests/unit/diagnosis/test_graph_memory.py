"""What is counted from a shape is what a graph was measured to hold."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from colfolio.attention import set_attention
from colfolio.diagnosis.planning.graph_memory import Rows, graph_memory
from colfolio.diagnosis.planning.numerics import Numerics
from colfolio.models.border import frozen_border
from colfolio.models.gradient_checkpointing import checkpoint_layers
from colfolio.models.precision import autocast
from colfolio.training.graph_budget import GraphBudget

CPU = torch.device("cpu")
MID = {
    "text": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4},
    "vision": {"depth": 4, "embed_dim": 96, "hidden_size": 128, "num_heads": 3, "mlp_ratio": 4},
}
FROZEN = {
    "nothing": (),
    "vision": ("visual.",),
    "blocks": ("visual.patch_embed", "visual.blocks.0.", "visual.blocks.1."),
    "half": ("visual.", "language_model.embed_tokens", "language_model.layers.0."),
}


@pytest.fixture
def mid(make_retriever):
    text = MID["text"] | {
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [8, 4, 4],
        },
    }
    return make_retriever(text=text, vision=MID["vision"]).train()


@pytest.fixture
def tiny(retriever):
    return retriever.train()


def freeze(retriever, what):
    for name, weight in retriever.backbone.named_parameters():
        weight.requires_grad_(not name.startswith(FROZEN[what]))


def rows_of(packed):
    return Rows(packed.lengths.tolist(), packed.grid_thw.prod(dim=1).tolist())


def forward(retriever, packed, precision):
    """The graph of rows, with what lies below the border run apart from it, as a step does."""
    with autocast(precision, CPU):
        border = frozen_border(retriever.backbone, is_visual=len(packed.grid_thw) > 0)
        below = retriever.run_below(packed, border) if border else None
        budget = GraphBudget(retriever, activation_mb=1e9)
        with budget.measuring(packed) as held:
            vectors = retriever(packed, below).vectors
    return vectors, held.num_bytes


@pytest.fixture
def sides(random_image, texts):
    """Packs rows of a model: long, short, of one length and of many."""

    def pack(retriever):
        sizes = {
            "long": [(280, 336)] * 2,
            "short": [(56, 84)] * 3,
            "single": [(56, 84)],
            "mixed": [(28, 56), (56, 84), (56, 84), (280, 308), (308, 280), (196, 196)],
            "short mixed": [(28, 56), (56, 84), (84, 84)],
        }
        packed = {
            name: retriever.collator.documents([random_image(*size) for size in each])
            for name, each in sizes.items()
        }
        packed["queries"] = retriever.collator.queries(texts)
        return packed | {"equal queries": retriever.collator.queries(["red circle"] * 5)}

    return pack


@pytest.mark.parametrize("size", ["tiny", "mid"])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_graph_holds_what_is_counted(request, sides, size, frozen, precision, attention):
    retriever = request.getfixturevalue(size)
    freeze(retriever, frozen)
    set_attention(retriever.backbone, attention)
    for which in ("none", 2):
        checkpoint_layers(retriever.backbone, which)
        for name, packed in sides(retriever).items():
            counted = graph_memory(
                retriever, rows_of(packed), Numerics(precision, attention, is_cuda=False)
            )
            measured = forward(retriever, packed, precision)[1]
            assert counted.held == pytest.approx(measured, rel=0.02), (which, name)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_graph_of_another_family_holds_what_is_counted(
    make_family_retriever, random_image, texts, family, frozen, precision, attention
):
    retriever = make_family_retriever(family).train()
    freeze(retriever, frozen)
    set_attention(retriever.backbone, attention)
    side = 8 * retriever.contract.pixel_budget.patch  # whole windows
    for sizes in ([(side, side)] * 3, [(side, 2 * side)], [(side, side), (2 * side, side)]):
        packed = retriever.collator.documents([random_image(*size) for size in sizes])
        counted = graph_memory(
            retriever, rows_of(packed), Numerics(precision, attention, is_cuda=False)
        )
        measured = forward(retriever, packed, precision)[1]
        assert counted.held == pytest.approx(measured, rel=0.02), sizes
    packed = retriever.collator.queries(texts)
    counted = graph_memory(retriever, rows_of(packed), Numerics(precision, attention, False))
    assert counted.held == pytest.approx(forward(retriever, packed, precision)[1], rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("frozen", ["nothing", "vision"])
def test_checkpointed_layers_hold_their_inputs_and_the_angles_of_all(mid, sides, precision, frozen):
    freeze(mid, frozen)
    checkpoint_layers(mid.backbone, "all")
    for name, packed in sides(mid).items():
        counted = graph_memory(mid, rows_of(packed), Numerics(precision, "sdpa", is_cuda=False))
        measured = forward(mid, packed, precision)[1]
        # cosines and sines reach a checkpointed layer past what is measured
        angles = len(packed.token_ids) * 2 * 32 * 4
        angles += len(packed.patches) * 2 * 32 * 4 if frozen == "nothing" else 0
        assert counted.held == pytest.approx(measured + angles, rel=0.02), name


def test_adapters_hold_their_own_inputs_and_not_those_of_frozen_weights(mid, sides):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=r".*\.(q_proj|v_proj|up_proj|qkv|fc1)")
    peft.inject_adapter_in_model(config, mid.backbone)
    for precision in ("fp32", "bf16"):
        for name, packed in sides(mid).items():
            counted = graph_memory(mid, rows_of(packed), Numerics(precision, "sdpa", is_cuda=False))
            measured = forward(mid, packed, precision)[1]
            assert counted.held == pytest.approx(measured, rel=0.1), (precision, name)


def allocated_at_most(run):
    """The highest sum of what torch allocated and gave back in a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("which", ["none", 2, "all"])
def test_the_highest_moment_of_a_graph_is_not_above_what_is_counted(mid, sides, precision, which):
    checkpoint_layers(mid.backbone, which)
    for weight in mid.parameters():
        weight.grad = torch.zeros_like(weight)
    packed = sides(mid)["long"]
    gradient = torch.randn(len(packed.token_ids), mid.dim)

    def run():
        with autocast(precision, CPU):
            vectors = mid(packed).vectors
        vectors.backward(gradient)

    run()
    counted = graph_memory(mid, rows_of(packed), Numerics(precision, "sdpa", is_cuda=False)).peak
    assert 0.98 * counted / 1.3 < allocated_at_most(run) < 1.02 * counted


@pytest.mark.parametrize("attention", ["varlen", "flash_attention_2", "sdpa"])
def test_a_gpu_keeps_no_attention_weights(mid, attention):
    numerics = Numerics("bf16", attention, is_cuda=True)
    one, four = (
        graph_memory(mid, Rows([300 * count], [1000 * count]), numerics).held for count in (1, 4)
    )
    weights = sum(p.numel() for name, p in mid.named_parameters() if p.ndim == 2) * 2
    assert four < 4 * one
    assert four > 4 * (one - weights)


def test_weights_gathered_from_ranks_leave_no_copy_in_a_graph(mid):
    rows = Rows([300], [1000])
    own, gathered = (
        graph_memory(mid, rows, Numerics("bf16", "varlen", True, is_gathered)).held
        for is_gathered in (False, True)
    )
    linears = [part for part in mid.modules() if isinstance(part, torch.nn.Linear)]
    assert own - gathered == 2 * sum(part.weight.numel() for part in linears)
