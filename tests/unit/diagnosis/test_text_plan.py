"""A plan of a run on conversations says what its step was measured to take."""

import copy
from functools import partial

import pytest
import torch
from conversing import generator_of, write_lines, write_moving
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from colfolio.attention import set_attention
from colfolio.data.conversation_batches import collated
from colfolio.data.conversations import load_conversations
from colfolio.diagnosis.ledgers.text import make_text_ledger
from colfolio.diagnosis.planning import (
    Machine,
    assumed_text,
    make_plan,
    measured_text,
    named_gpu,
)
from colfolio.diagnosis.planning.arithmetic import work_of
from colfolio.diagnosis.planning.graph_memory import Rows, graph_memory
from colfolio.diagnosis.planning.numerics import Numerics
from colfolio.errors import DatasetError
from colfolio.models.gradient_checkpointing import checkpoint_layers
from colfolio.training import TrainSettings
from colfolio.training.exact_batch import MemorySettings
from colfolio.training.generation import ExactText

CPU = torch.device("cpu")
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [8, 4, 4]},
}
VISION = {"depth": 4, "embed_dim": 96, "hidden_size": 128, "num_heads": 3, "mlp_ratio": 4}
ANSWER = "left " * 20
FROZEN = {
    "nothing": (),
    "vision": ("backbone.visual.",),
    "head and embedding": ("projection.", "backbone.language_model.embed_tokens."),
}


@pytest.fixture
def make(tiny_shape):
    """A generator whose vocabulary is large beside its towers."""

    def make(tied=False, vocabulary=6000):
        backbone = copy.deepcopy(tiny_shape.backbone)
        backbone["text_config"] |= TEXT | {"vocab_size": vocabulary}
        backbone["vision_config"] |= VISION
        shape = tiny_shape.model_copy(update={"backbone": backbone})
        return generator_of(shape, tied=tied).train()

    return make


@pytest.fixture
def dataset(tmp_path, random_image, encode_png):
    """Images of 280 x 336 pixels, each with an answer of the same length."""
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(encode_png(random_image(280, 336, number)))
    rows = [
        {"image": f"{number}.png", "question": "where?", "answer": ANSWER} for number in range(12)
    ]
    write_lines(tmp_path, "train", rows)
    return load_conversations(tmp_path, "train")


def settings_of(**values):
    fixed = {"objective": "generation", "steps": 10, "batch": {"rows": 8}, "precision": "fp32"}
    return TrainSettings.model_validate(fixed | values)


def planned(generator, dataset, num_bytes=10**10, **values):
    settings = settings_of(**values)
    sizes = measured_text(dataset, generator, settings)
    machine = Machine("a CPU", num_bytes, CPU)
    return make_plan(generator, settings, sizes, machine, 1, kept_checkpoints=2)


def batch_of(generator, dataset, count=8):
    return collated(dataset, range(count), generator.chat, generator.contract.frame_rate)


def freeze(generator, what):
    for name, weight in generator.named_parameters():
        weight.requires_grad_(not name.startswith(FROZEN[what]))


def _append_last(measured, *given):
    measured.append(given[-1])


def counted_rows(batch):
    inputs = batch.inputs
    grids = [
        rows * columns for steps, rows, columns in inputs.grid_thw.tolist() for _ in range(steps)
    ]
    return Rows(inputs.lengths.tolist(), grids, batch.num_labels)


def allocated_at_most(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_holds_what_is_counted(make, dataset, monkeypatch, tied, frozen, precision):
    generator = make(tied)
    freeze(generator, frozen)
    set_attention(generator.backbone, "sdpa")
    batch = batch_of(generator, dataset, 2)
    for which in ("none", 2):
        checkpoint_layers(generator.backbone, which)
        numerics = Numerics(precision, "sdpa", is_cuda=False)
        counted = graph_memory(generator, counted_rows(batch), numerics)
        exact = ExactText(generator, MemorySettings(activation_mb=1e6), precision)
        with monkeypatch.context() as patched:
            measured = []
            note = partial(_append_last, measured)
            patched.setattr(exact._budget, "check", note)
            exact.backward([batch], [0])
        assert counted.held == pytest.approx(measured[0].num_bytes, rel=0.02), which


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("which", ["none", "all"])
@pytest.mark.parametrize("memory", [{}, {"chunk_tokens": 400}])
def test_a_step_takes_no_more_than_planned(make, dataset, tied, precision, which, memory):
    generator = make(tied)
    plan = planned(
        generator, dataset, precision=precision, gradient_checkpointing=which, memory=memory
    )
    for weight in generator.parameters():
        weight.grad = torch.zeros_like(weight)
    batch = batch_of(generator, dataset)
    exact = ExactText(generator, MemorySettings.model_validate(memory), precision)
    exact.backward([batch], [0])
    highest = allocated_at_most(lambda: exact.backward([batch], [0]))
    assert 0.7 * plan.largest.own.peak < highest < 1.02 * plan.largest.own.peak


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", FROZEN)
def test_operations_are_those_that_run(make, dataset, tied, frozen):
    generator = make(tied, vocabulary=600)
    freeze(generator, frozen)
    set_attention(generator.backbone, "eager")
    batch = batch_of(generator, dataset, 2)
    counter = FlopCounterMode(display=False)
    with counter:
        ExactText(generator, MemorySettings()).backward([batch], [0])
    work = work_of(generator, counted_rows(batch))
    total = work.below + work.forward + work.backward
    assert total == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_sizes_are_those_of_the_rows_of_clips(make, tmp_path):
    generator = make(vocabulary=600)
    write_moving(tmp_path, "train", 9)
    dataset = load_conversations(tmp_path, "train")
    size = measured_text(dataset, generator, settings_of())
    batch = batch_of(generator, dataset, 1)
    row = size.row
    found = (len(batch.inputs.token_ids), len(batch.inputs.patches), batch.num_labels)
    assert (row.tokens, row.patches, row.answers) == found
    assert (row.steps, size.largest, size.corpus) == (2, row.tokens, 9)
    assert size.heavy == row
    assert size.origin == "9 of 9 conversations measured"


def test_a_heavy_batch_is_made_of_more_than_the_mean_row(make, tmp_path, random_image, encode_png):
    generator = make(vocabulary=600)
    rows = []
    for number in range(24):
        pixels = random_image(28 * (1 + number % 8), 56, number)
        (tmp_path / f"{number}.png").write_bytes(encode_png(pixels))
        answer = "left " * (1 + number % 5)
        rows.append({"image": f"{number}.png", "question": "where?", "answer": answer})
    write_lines(tmp_path, "train", rows)
    size = measured_text(load_conversations(tmp_path, "train"), generator, settings_of())
    for name in ("tokens", "patches", "answers"):
        assert getattr(size.row, name) < getattr(size.heavy, name)
    assert size.heavy.tokens <= size.largest


def test_epochs_are_those_of_the_ledger(make, dataset):
    generator = make(vocabulary=600)
    settings = settings_of(steps=30, accumulation=2, batch={"rows": 5})
    size = measured_text(dataset, generator, settings)
    plan = make_plan(generator, settings, size, named_gpu("t4-16gb"), 1, kept_checkpoints=1)
    ledger = make_text_ledger(dataset, settings, 1, generator.chat, 600, {}, "")
    assert plan.epochs == pytest.approx(ledger.epochs)


def test_without_a_dataset_an_image_is_as_large_as_the_model_takes(make):
    generator = make(vocabulary=600)
    size = assumed_text(generator, settings_of().batch)
    assert size.row.patches == generator.contract.pixel_budget.max_pixels // 28**2 * 4
    assert size.row.tokens > size.row.patches // 4 + size.row.answers
    assert size.epoch is None


def test_a_batch_larger_than_the_split_is_refused(make, dataset):
    settings = settings_of(batch={"rows": 13})
    with pytest.raises(DatasetError, match=r"batch\.rows is 13"):
        measured_text(dataset, make(vocabulary=600), settings)


def test_logits_are_what_a_long_answer_costs(make, dataset):
    generator = make()
    lengths = Rows([143] * 8, [224] * 8, 22 * 8)
    numerics = Numerics("fp32", "sdpa", is_cuda=False)
    few, many = (
        graph_memory(generator, Rows(lengths.lengths, lengths.patches, answers), numerics)
        for answers in (176, 1760)
    )
    logits = 1584 * generator.vocabulary * 4
    assert many.held - few.held == pytest.approx(logits, rel=0.05)
    assert many.peak - few.peak == pytest.approx(3 * logits, rel=0.05)


def test_what_fits_is_advised_and_honoured(make, dataset):
    generator = make()
    whole = planned(generator, dataset)
    fixed = sum(part.num_bytes for part in whole.largest.fixed)
    room = int((fixed + whole.largest.own.peak / 2) / 0.9)
    plan = planned(generator, dataset, room)
    assert not plan.fits
    advice = plan.largest.advice
    memory = {
        "chunk_tokens": advice.chunk_tokens,
        "activation_mb": advice.activation_bytes / 2**20,
    }
    assert planned(generator, dataset, room, memory=memory).fits
    assert advice.num_chunks["conversations"] > 1
    exact = ExactText(generator, MemorySettings.model_validate(memory))
    exact.backward([batch_of(generator, dataset)], [0])
    assert planned(generator, dataset, 10**7).largest.advice is None


def test_ranks_share_the_rows_of_a_batch(make, dataset):
    generator, settings = make(vocabulary=600), settings_of()
    size = measured_text(dataset, generator, settings)
    one, four = (
        make_plan(generator, settings, size, named_gpu("h100-80gb"), ranks, kept_checkpoints=1)
        for ranks in (1, 4)
    )
    assert four.largest.own.peak < one.largest.own.peak / 2
    assert four.flops_a_step == pytest.approx(one.flops_a_step / 4)
