"""A plan says what a step was measured to take, and recommends what a step can honour."""

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from colfolio.attention import set_attention
from colfolio.batch import ContrastiveBatch
from colfolio.data.dataset import CorpusRow, Query, load_dataset, write_split
from colfolio.diagnosis.planning import (
    GPUS,
    Machine,
    assumed_sizes,
    make_plan,
    measured_sizes,
    named_gpu,
    this_machine,
)
from colfolio.diagnosis.planning.arithmetic import work_of
from colfolio.diagnosis.planning.fixed_memory import state_bytes
from colfolio.diagnosis.planning.graph_memory import Rows
from colfolio.diagnosis.planning.machine import numerics_of
from colfolio.errors import ColfolioError, RecipeError
from colfolio.training import TrainSettings, save_checkpoint, start_training, train
from colfolio.training.exact_batch import ExactBatch, MemorySettings
from colfolio.training.losses import LossSettings, contrastive_loss

MIB = 2**20
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [8, 4, 4]},
}
VISION = {"depth": 4, "embed_dim": 96, "hidden_size": 128, "num_heads": 3, "mlp_ratio": 4}


@pytest.fixture
def mid(make_retriever):
    return make_retriever(text=TEXT, vision=VISION).train()


@pytest.fixture
def small(make_retriever):
    return make_retriever()


def settings_of(**values):
    return TrainSettings.model_validate(
        {"steps": 10, "batch": {"rows": 8}, "precision": "fp32"} | values
    )


def batch_of(retriever, image, count):
    """So many queries and as many documents, all alike."""
    documents = retriever.collator.documents([image] * count)
    queries = retriever.collator.queries(["red circle 00"] * count)
    ids = torch.arange(count)
    positives = torch.eye(count, dtype=torch.bool)
    return ContrastiveBatch(queries, documents, positives, positives & False, ids, ids)


@pytest.fixture
def dataset(tmp_path, random_image, encode_png):
    """Pages of 280 x 336 pixels, each the answer to one query."""
    pages = [CorpusRow(f"p{n}", encode_png(random_image(280, 336, n)), f"d{n}") for n in range(12)]
    queries = [Query(f"q{n}", f"red circle {n:02}") for n in range(12)]
    write_split(tmp_path, "train", pages, queries, {f"q{n}": {f"p{n}": 1} for n in range(12)})
    return load_dataset(tmp_path, "train")


@pytest.fixture
def machine():
    """Makes a CPU of so many bytes."""

    def make(num_bytes):
        return Machine("a CPU", num_bytes, torch.device("cpu"))

    return make


@pytest.fixture
def planned(mid, dataset, machine):
    """Plans a recipe for the mid-size model, on a CPU of so many bytes."""

    def plan(num_bytes=10**10, **values):
        settings = settings_of(**values)
        batch = measured_sizes(dataset, mid.collator, settings)
        return make_plan(mid, settings, batch, machine(num_bytes), 1, kept_checkpoints=2)

    return plan


def step_of(retriever, image, memory, precision="fp32", count=8):
    """Runs a batch again, when costs are known; gives the share of its tokens that ran twice."""
    exact = ExactBatch(retriever, MemorySettings.model_validate(memory), precision)
    batch = batch_of(retriever, image, count)
    tokens = []
    handle = retriever.register_forward_pre_hook(
        lambda _, given: tokens.append(len(given[0].token_ids))
    )

    def loss(scores):
        return contrastive_loss(scores, batch.positives, batch.ignored, LossSettings())

    exact.backward(batch, loss, 0)
    tokens.clear()
    exact.backward(batch, loss, 0)
    handle.remove()
    return sum(tokens) / (len(batch.queries.token_ids) + len(batch.documents.token_ids)) - 1


def allocated_at_most(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("which", ["none", "all"])
@pytest.mark.parametrize("memory", [{}, {"chunk_tokens": 270}])
def test_a_step_takes_no_more_than_planned(mid, planned, random_image, precision, which, memory):
    plan = planned(precision=precision, gradient_checkpointing=which, memory=memory)
    for weight in mid.parameters():
        weight.grad = torch.zeros_like(weight)
    image = random_image(280, 336)
    step_of(mid, image, memory, precision)
    highest = allocated_at_most(lambda: step_of(mid, image, memory, precision))
    parts = {part.name.split(":")[0].split(",")[0]: part.num_bytes for part in plan.largest.fixed}
    there = ("weights", "gradients", "optimiser state", "inputs", "process and libraries")
    counted = plan.largest.taken - sum(parts[name] for name in there)
    assert 0.7 * counted < highest < 1.02 * counted


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("which", ["none", "all"])
def test_a_step_honours_the_advice_and_runs_as_much_twice(mid, planned, random_image, share, which):
    whole = planned(gradient_checkpointing=which)
    fixed = sum(part.num_bytes for part in whole.largest.fixed)
    needed = fixed + int(share * whole.largest.own.kept) + whole.largest.own.working
    plan = planned(int(needed / 0.9), gradient_checkpointing=which)
    advice = plan.largest.advice
    assert advice is not None
    assert fixed + advice.activation_bytes < plan.usable  # a chunk at work has room beside it
    memory = {
        "chunk_tokens": advice.chunk_tokens,
        "activation_mb": advice.activation_bytes / MIB,
    }
    advised = planned(int(needed / 0.9), gradient_checkpointing=which, memory=memory)
    assert advised.fits
    ran_twice = step_of(mid, random_image(280, 336), memory)
    # a hundredth of the memory may decide whether the queries are kept, 15 % of the tokens
    assert ran_twice == pytest.approx(advised.largest.own.share_twice, abs=0.16)


def test_more_memory_never_takes_more_time(planned):
    whole = planned()
    fixed = sum(part.num_bytes for part in whole.largest.fixed)
    advised = []
    for part in (1, 2, 4, 7, 10, 13):
        advised.append(planned(int((fixed + whole.largest.own.peak * part / 10) / 0.9)))
    advised = [plan.largest.advice for plan in advised]
    assert advised[-1].share_twice == 0
    times = [advice.relative_time for advice in advised if advice]
    assert times == sorted(times, reverse=True)


def test_what_does_not_fit_is_said(planned):
    assert planned().fits
    assert not planned(int(planned().largest.taken / 0.9) - 10**6).fits
    assert planned(10**8).largest.advice is None


def test_a_chunk_larger_than_its_budget_does_not_fit(planned):
    plan = planned(memory={"activation_mb": 1.0})
    assert plan.largest.taken <= plan.usable
    assert not plan.fits


@pytest.mark.parametrize("kind", ["fp32", "torchao_8bit", "bitsandbytes_8bit"])
def test_the_optimiser_keeps_what_is_planned(mid, kind):
    if kind != "fp32":
        pytest.importorskip(kind.removesuffix("_8bit"))
    settings = settings_of(optimiser={"state": kind})
    state = start_training(mid, settings)
    for weight in mid.parameters():
        weight.grad = torch.zeros_like(weight)
    with torch.compiler.set_stance("force_eager"):
        state.optimiser.step()
    kept = {
        id(tensor): tensor
        for values in state.optimiser.state.values()
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and value.numel() > 1 and "qmap" not in name
        for tensor in _plain(value)
    }
    measured = sum(tensor.nbytes for tensor in kept.values())
    assert state_bytes(mid, settings) == pytest.approx(measured, rel=0.01)


def _plain(tensor):
    """The tensors that a quantised one is made of."""
    if hasattr(tensor, "codes"):
        return [tensor.codes, tensor.scale]
    return [tensor]


def test_disk_is_that_of_real_checkpoints(mid, planned, dataset, tmp_path):
    plan = planned()
    state = start_training(mid, settings_of(steps=1))
    list(train(state, dataset))
    folder = tmp_path / "checkpoints"
    saved = save_checkpoint(state, folder, dataset.fingerprint, keep=2)
    sizes = {path.name: path.stat().st_size for path in saved.rglob("*") if path.is_file()}
    checkpoints, model = (part.num_bytes for part in plan.disk)
    assert checkpoints == pytest.approx(3 * sum(sizes.values()), rel=0.05)
    assert model == pytest.approx(sizes["model.safetensors"], rel=0.05)


@pytest.mark.parametrize("frozen", ["nothing", "vision"])
def test_operations_are_those_that_run(mid, random_image, frozen):
    mid.backbone.visual.requires_grad_(frozen == "nothing")
    set_attention(mid.backbone, "eager")
    packed = mid.collator.documents([random_image(280, 336)])
    counter = FlopCounterMode(display=False)
    with counter:
        mid(packed).vectors.sum().backward()
    work = work_of(mid, Rows(packed.lengths.tolist(), packed.grid_thw.prod(dim=1).tolist()))
    total = work.below + work.forward + work.backward
    assert total == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_sizes_are_those_of_the_rows(mid, dataset, random_image):
    batch = measured_sizes(dataset, mid.collator, settings_of())
    packed = mid.collator.documents([random_image(280, 336)])
    assert (batch.document.tokens, batch.document.patches) == (
        len(packed.token_ids),
        len(packed.patches),
    )
    assert batch.query.tokens == len(mid.collator.queries(["red circle 00"]).token_ids)
    assert (batch.queries, batch.documents, batch.epoch) == (8, 8, 12.0)


def test_sizes_of_ragged_pages_cover_a_heavy_batch(mid, tmp_path, random_image, encode_png):
    generator = np.random.default_rng(0)
    sizes = [(28 * int(a), 28 * int(b)) for a, b in generator.integers(1, 12, (40, 2))]
    pages = [
        CorpusRow(f"p{n}", encode_png(random_image(*size, n)), f"d{n}")
        for n, size in enumerate(sizes)
    ]
    queries = [Query(f"q{n}", "red") for n in range(40)]
    write_split(tmp_path, "train", pages, queries, {f"q{n}": {f"p{n}": 1} for n in range(40)})
    dataset = load_dataset(tmp_path, "train")
    batch = measured_sizes(dataset, mid.collator, settings_of())
    tokens = [len(mid.collator.documents([random_image(*size)]).token_ids) for size in sizes]
    heaviest = max(sum(generator.choice(tokens, 8, replace=False)) for _ in range(50))
    assert heaviest <= 8 * batch.heavy_document.tokens
    assert batch.document.tokens < batch.heavy_document.tokens <= max(tokens) == batch.largest


def test_without_a_dataset_pages_are_as_large_as_the_model_takes(mid):
    batch = assumed_sizes(mid.collator, settings_of().batch)
    budget = mid.contract.pixel_budget
    assert batch.document.patches == budget.max_pixels // 28**2 * 4
    assert batch.documents == 16
    assert batch.epoch is None


def test_ranks_share_a_batch_and_only_fsdp2_shares_the_weights(mid):
    settings = settings_of(batch={"rows": 8, "hard_negatives": 0})
    batch = assumed_sizes(mid.collator, settings.batch)
    gpu = named_gpu("h100-80gb")

    def parts(ranks, parallel):
        own = settings.model_copy(update={"parallel": parallel})
        plan = make_plan(mid, own, batch, gpu, ranks, kept_checkpoints=1)
        return plan, {part.name.split(",")[0]: part.num_bytes for part in plan.largest.fixed}

    alone, of_one = parts(1, "fsdp2")
    together, of_four = parts(4, "ddp")
    spread, of_four_spread = parts(4, "fsdp2")
    assert of_four["weights"] == of_one["weights"] == 4 * of_four_spread["weights"]
    assert together.largest.own.kept < alone.largest.own.kept / 3
    assert together.flops_a_step < alone.flops_a_step / 3
    assert together.disk == alone.disk == spread.disk


def test_features_from_a_cache_cost_no_operations(mid, dataset, machine):
    mid.backbone.visual.requires_grad_(False)
    plans = []
    for features in ({}, {"ram_mb": 1000.0}):
        settings = settings_of(steps=60, features=features)
        batch = measured_sizes(dataset, mid.collator, settings)
        plans.append(make_plan(mid, settings, batch, machine(10**10), 1, kept_checkpoints=1))
    below = work_of(mid, Rows([batch.document.tokens], [batch.document.patches])).below * 8
    saved = plans[0].flops_a_step - plans[1].flops_a_step
    assert plans[0].epochs == 40
    assert saved == pytest.approx(below * 39 / 40)


@pytest.mark.parametrize(
    ("gpu", "precision", "settled"),
    [
        ("h100-80gb", "auto", ("bf16", "varlen")),
        ("h100-80gb", "fp32", ("fp32", "sdpa")),
        ("t4-16gb", "auto", ("fp32", "sdpa")),
        ("v100-32gb", "fp16", ("fp16", "sdpa")),
    ],
)
def test_a_named_gpu_settles_what_a_recipe_leaves_open(gpu, precision, settled):
    numerics = numerics_of(settings_of(precision=precision), named_gpu(gpu), 1)
    assert (numerics.precision, numerics.attention) == settled


def test_a_kernel_that_a_named_gpu_lacks_is_refused():
    settings = settings_of(precision="fp16", attention="flash_attention_2")
    numerics_of(settings, named_gpu("a100-40gb"), 1)
    with pytest.raises(RecipeError, match="Ampere generation or later, not fp16 on t4-16gb"):
        numerics_of(settings, named_gpu("t4-16gb"), 1)


def test_an_unknown_gpu_is_answered_with_the_known_ones():
    with pytest.raises(ColfolioError, match=r"--gpu h100: is none of h100-80gb, .*v100-32gb"):
        named_gpu("h100")


def test_a_gpu_has_the_memory_in_its_name():
    for name, gpu in GPUS.items():
        assert name.endswith(f"-{gpu.num_bytes // 10**9}gb")


def test_ranks_on_one_processor_share_its_memory():
    if torch.cuda.is_available():
        pytest.skip("each rank has a GPU of its own")
    assert this_machine(2).num_bytes == this_machine(1).num_bytes // 2
