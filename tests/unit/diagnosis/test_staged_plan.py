"""A plan of a run whose parts open in stages counts what trains in the end."""

import pytest
from conversing import generator_of

from colfolio.diagnosis.planning import Machine, assumed_sizes, assumed_text, make_plan, named_gpu
from colfolio.models.generator import Generator
from colfolio.training import TrainSettings
from colfolio.training.start import begin_policy
from colfolio.training.thaw import trained_names

GPU = named_gpu("h100-80gb")
LORA = {"rank": 2, "vision": ["attn.qkv"], "projection": "frozen"}
TOP = {"open": ["layers[1]", "norm"], "step": 4, "lr": 1e-3}
REST = {"open": ["all"], "step": 7, "lr": 1e-4}


@pytest.fixture(params=["retrieval", "generation"])
def fresh(request, make_retriever, tiny_shape):
    """Makes models of an objective, all alike."""

    def make():
        return make_retriever() if request.param == "retrieval" else generator_of(tiny_shape)

    make.objective = request.param
    return make


@pytest.fixture
def planned(fresh):
    """Plans a run of ten steps of a new model."""

    def plan(machine=GPU, ranks=1, batch=None, **values):
        fixed = {"objective": fresh.objective, "steps": 10, "batch": {"rows": 8}}
        settings = TrainSettings.model_validate(fixed | {"precision": "fp32"} | values)
        model = fresh()
        begin_policy(model, settings)
        before = trained_names(model)
        if isinstance(model, Generator):
            sizes = assumed_text(model, settings.batch)
        else:
            sizes = assumed_sizes(model.collator, settings.batch)
        found = make_plan(model, settings, batch or sizes, machine, ranks, kept_checkpoints=2)
        assert trained_names(model) == before
        return found

    return plan


def told(plan, phase):
    """What a phase takes, and what of a plan depends on it."""
    numbers = (phase.num_weights, phase.num_trained, phase.fixed, phase.own, phase.disk)
    return numbers, plan.flops_of(phase)


@pytest.mark.parametrize("policy", [{"frozen": ["vision", "layers", "norm"]}, {"lora": LORA}])
@pytest.mark.parametrize("which", ["none", "all"])
def test_what_opens_in_the_end_is_planned_as_if_it_trained_from_the_beginning(
    planned, policy, which
):
    own = {"gradient_checkpointing": which}
    staged = planned(thaw=[TOP, REST], **policy, **own)
    first, middle, last = staged.phases
    alone, whole = planned(**policy, **own), planned(**own)
    assert told(staged, first) == told(alone, alone.largest)
    assert told(staged, last) == told(whole, whole.largest)
    assert first.num_trained < middle.num_trained < last.num_trained
    assert staged.largest is last
    assert (staged.largest.name, staged.largest.first) == ("thaw.1", 7)
    assert staged.disk == whole.disk


def test_operations_are_those_of_each_phase_by_its_steps(planned):
    plan = planned(frozen=["vision", "layers", "norm"], thaw=[TOP, REST])
    assert [phase.share for phase in plan.phases] == pytest.approx([0.4, 0.3, 0.3])
    flops = [plan.flops_of(phase) for phase in plan.phases]
    assert flops[0] < flops[1] < flops[2]
    expected = 0.4 * flops[0] + 0.3 * flops[1] + 0.3 * flops[2]
    assert plan.flops_a_step == pytest.approx(expected)


def test_a_machine_that_holds_the_beginning_alone_is_too_small(planned):
    policy = {"frozen": ["vision", "embedding", "layers", "norm"]}
    alone, staged = planned(**policy), planned(thaw=[TOP, REST], **policy)
    between = (alone.largest.taken + staged.largest.taken) // 2
    small = Machine("small", int(between / 0.9), None, (8, 0), 1e12, 1e12)
    assert planned(machine=small, **policy).fits
    refused = planned(machine=small, thaw=[TOP, REST], **policy)
    assert not refused.fits
    advice = refused.largest.advice
    assert advice is not None
    budget = advice.activation_bytes / 2**20
    memory = {"chunk_tokens": advice.chunk_tokens, "activation_mb": budget}
    advised = planned(machine=small, thaw=[TOP, REST], memory=memory, **policy)
    assert all(phase.fits(advised.usable) for phase in advised.phases)


def test_what_is_frozen_until_the_first_step_is_no_phase(planned):
    plan = planned(frozen=["all"], thaw=[REST | {"step": 0}])
    assert [(phase.name, phase.share) for phase in plan.phases] == [("thaw.0", 1.0)]


def test_an_epoch_of_unknown_length_counts_from_where_it_may_begin(planned):
    plan = planned(frozen=["norm"], thaw=[REST | {"step": None, "epoch": 1.5}])
    assert [(phase.first, phase.is_exact) for phase in plan.phases] == [(0, True), (0, False)]
    assert plan.flops_a_step == pytest.approx(plan.flops_of(plan.phases[1]))


def test_a_spread_model_is_put_together_to_open(planned):
    shared = {"frozen": ["vision", "layers", "norm"], "thaw": [REST]}
    alone, four = planned(parallel="fsdp2", **shared), planned(ranks=4, parallel="fsdp2", **shared)
    first, last = four.phases
    state = next(part.num_bytes for part in first.fixed if "state" in part.name)
    assert first.whole == 4 * first.num_weights
    assert last.whole == pytest.approx(5 * first.num_weights + state, rel=0.01)
    assert alone.phases[1].whole == 0
    usable = (first.whole + last.whole) // 2
    assert not last.fits(usable)


def test_a_signal_counts_from_the_first_step_at_which_it_can_come(make_retriever):
    stage = REST | {"step": None, "margin_flat": 2}
    settings = TrainSettings.model_validate(
        {"steps": 40, "thaw_window": 10, "frozen": ["norm"], "thaw": [stage]}
    )
    model = make_retriever()
    begin_policy(model, settings)
    sizes = assumed_sizes(model.collator, settings.batch)
    plan = make_plan(model, settings, sizes, GPU, 1, kept_checkpoints=1)
    assert [(each.first, each.is_exact) for each in plan.phases] == [(0, True), (30, False)]
    assert plan.phases[0].share == 0.75
