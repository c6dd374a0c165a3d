"""Each cause is named from numbers that mean it, and from a healthy run's numbers none is."""

import math
from dataclasses import replace

import pytest

from colfolio.diagnosis.causes import HEALTHY, UNKNOWN, diagnose
from colfolio.diagnosis.evidence import (
    DataFacts,
    Evidence,
    Fault,
    ModelFacts,
    ProbeSignals,
    Settled,
)
from colfolio.diagnosis.training_log import LoggedEvaluation, LoggedPart, LoggedStep

ROWS = 64
CHANCE = math.log(ROWS)
SETTLED = Settled("info_nce", lr=1e-3, steps=300, warmup_steps=20, rows=ROWS, precision="fp32")
DATA = DataFacts(
    queries=2000,
    documents=2000,
    median_document_tokens=12.0,
    validation_documents=100,
    epoch_overlap=0.03,
    neighbours=0.03,
)
MODEL = ModelFacts(trains={"vision": 100, "layers": 200, "projection": 20})
PROBE = ProbeSignals(
    step=0,
    documents=32,
    loss=3.5,
    chance=math.log(32),
    floor=0.0,
    margin=-1.0,
    mean_margin=0.0,
    rank=16.5,
    accuracy=0.03,
    spread=0.5,
    query_cosine=0.6,
    document_cosine=0.7,
    query_rank=9.0,
    document_rank=8.0,
    dim=32,
    same_winner=0.3,
    query_distance=0.0,
    document_distance=0.0,
    shift=1,
    shift_accuracy=0.06,
    confident=0.1,
    distinct_scores=1.0,
    score_error=1e-6,
)
TRAINED = replace(
    PROBE,
    step=300,
    loss=0.4,
    margin=1.0,
    accuracy=0.9,
    spread=2.0,
    rank=1.2,
    query_distance=0.4,
    document_distance=0.5,
)


def steps(losses, update=1e-3, gradient=0.5, accuracy=0.9, lr=1e-3, chance=CHANCE, floor=0.0):
    part = LoggedPart(lr, gradient, update)
    return tuple(
        LoggedStep(
            number + 1,
            loss,
            chance,
            0.0,
            lr,
            100.0,
            float(ROWS),
            0.0,
            floor=floor,
            accuracy=accuracy,
            parts={"layers": part, "projection": part},
        )
        for number, loss in enumerate(losses)
    )


def falling(to=0.4):
    """A loss from chance downwards, with the noise that batches have."""
    return [
        to + (CHANCE - to) * math.exp(-number / 60) + 0.05 * math.sin(number)
        for number in range(300)
    ]


def at_chance(noise=0.05):
    return [CHANCE + noise * math.sin(1.7 * number) for number in range(300)]


LEARNT = Evidence(
    SETTLED,
    steps(falling()),
    (),
    (PROBE, TRAINED),
    DATA,
    MODEL,
    candidates=float(ROWS),
    masked=0.0,
)
STUCK = replace(
    LEARNT,
    steps=steps(at_chance(), accuracy=0.02),
    probes=(PROBE, replace(PROBE, step=300, query_distance=0.1, document_distance=0.1)),
)


def validated(losses):
    rows = enumerate(losses)
    return tuple(
        LoggedEvaluation(100 * (row + 1), "validation", {"loss": loss, "chance": math.log(65)})
        for row, loss in rows
    )


def test_a_run_that_learns_has_no_cause_and_each_was_looked_for():
    found = diagnose(replace(LEARNT, evaluations=validated([2.0, 1.0, 0.8])))
    assert [finding.cause for finding in found.findings] == [HEALTHY]
    assert not set(found.unasked) - {"adapter", "wrong_labels"}  # not of its model
    assert len(found.ruled_out) > 20


CASES = {
    "not_finite": replace(STUCK, fault=Fault(12, "loss", "backbone.layers.1")),
    "fresh_tensors": replace(STUCK, model=replace(MODEL, fresh=("custom_text_proj.weight",))),
    "adapter_not_loaded": replace(LEARNT, model=replace(MODEL, adapter_effect=0.0)),
    "adapter_of_another_base": replace(LEARNT, model=replace(MODEL, adapter_is_of_base=False)),
    "positions_flattened": replace(LEARNT, model=replace(MODEL, positions="flattened")),
    "wrong_template": replace(
        LEARNT, model=replace(MODEL, template_faults=("queries lack 'Query: '",))
    ),
    "padding_side": replace(LEARNT, model=replace(MODEL, padding_side="right")),
    "truncated_images": replace(LEARNT, data=replace(DATA, truncated=0.4)),
    "blank_documents": replace(STUCK, data=replace(DATA, blank=0.6)),
    "images_unseen": replace(
        STUCK, probes=(replace(PROBE, document_cosine=1.0, spread=0.0), STUCK.probes[1])
    ),
    "queries_alike": replace(STUCK, probes=(replace(PROBE, query_cosine=1.0), STUCK.probes[1])),
    "fixed_order": replace(LEARNT, data=replace(DATA, epoch_overlap=1.0)),
    "shifted_labels": replace(
        STUCK, probes=(replace(PROBE, shift=-1, shift_accuracy=0.8), STUCK.probes[1])
    ),
    "dead_part": replace(
        LEARNT,
        steps=tuple(
            replace(step, parts={**step.parts, "vision": LoggedPart(1e-3, 0.0, 0.0)})
            for step in LEARNT.steps
        ),
    ),
    "rounded_scores": replace(
        LEARNT, probes=(replace(PROBE, score_error=0.3, distinct_scores=0.05), TRAINED)
    ),
    "overflow": replace(LEARNT, skipped=0.4),
    "rate_too_high": replace(STUCK, steps=steps(at_chance(), update=0.5)),
    "collapsed": replace(
        STUCK,
        probes=(PROBE, replace(TRAINED, accuracy=0.0, spread=0.001, document_cosine=0.9999)),
    ),
    "leaked_split": replace(LEARNT, data=replace(DATA, leaked=0.5)),
    "temperature_floor": replace(
        LEARNT, steps=steps([0.7 * CHANCE] * 300, floor=0.65 * CHANCE, accuracy=0.95)
    ),
    "false_negatives": replace(LEARNT, data=replace(DATA, copies=0.1)),
    "wrong_labels": replace(
        STUCK,
        model=replace(MODEL, is_trained=True),
        probes=(replace(PROBE, confident=0.8, loss=6.0), STUCK.probes[1]),
    ),
    "temperature_too_low": replace(
        STUCK,
        settled=replace(SETTLED, temperature=0.02),
        probes=(replace(PROBE, loss=30.0), STUCK.probes[1]),
    ),
    "flat_start": replace(STUCK, probes=(replace(PROBE, spread=0.01), STUCK.probes[1])),
    "temperature_too_high": replace(STUCK, settled=replace(SETTLED, temperature=50.0)),
    "rate_too_low": replace(
        STUCK,
        steps=steps(at_chance(), update=1e-7, lr=1e-7),
        probes=(PROBE, replace(PROBE, step=300, document_distance=1e-5)),
    ),
    "warmup_too_long": replace(
        STUCK,
        settled=replace(SETTLED, warmup_steps=5000),
        steps=steps(at_chance(), update=1e-7, lr=1e-5),
        probes=(PROBE, replace(PROBE, step=300, document_distance=1e-5)),
    ),
    "frozen_parts": replace(
        STUCK, model=replace(MODEL, trains={"projection": 20}, frozen={"layers": 200})
    ),
    "few_candidates": replace(
        LEARNT,
        settled=replace(SETTLED, rows=3, accumulation=16),
        candidates=3.0,
        probes=(PROBE, replace(TRAINED, accuracy=0.2)),
    ),
    "over_fitting": replace(LEARNT, evaluations=validated([2.0, 1.0, 1.6, 2.2])),
    "not_started": STUCK,
}


@pytest.mark.parametrize("cause", CASES)
def test_the_cause_is_named_first(cause):
    found = diagnose(CASES[cause])
    assert found.first.cause == cause
    told = found.first.paragraph()
    assert told[0].isupper()
    assert told.endswith(".")
    assert found.first.action
    assert found.first.evidence or cause.startswith("positions")


def test_a_loss_that_nothing_explains_is_called_unknown():
    found = diagnose(replace(STUCK, steps=steps([0.94 * CHANCE] * 300)))
    assert found.first.cause == UNKNOWN
    assert "causes were ruled out" in found.first.paragraph()


def test_a_constant_pairwise_loss_in_another_trainers_log_is_a_collapse():
    losses = [math.log(2) + 1e-4 * (number % 2) for number in range(200)]
    logged = tuple(
        LoggedStep(number + 1, loss, math.log(2), None, None, None)
        for number, loss in enumerate(losses)
    )
    found = diagnose(Evidence(Settled("pairwise", rows=3), logged))
    assert found.first.cause == "collapsed"
    assert found.first.change == {"train.loss.kind": "info_nce"}


def test_what_is_measured_directly_comes_before_what_is_inferred():
    both = replace(STUCK, data=replace(DATA, epoch_overlap=1.0))
    causes = [finding.cause for finding in diagnose(both).findings]
    assert causes[0] == "fixed_order"
    assert "not_started" in causes


def test_accumulation_is_told_to_add_no_candidates():
    paragraph = diagnose(CASES["few_candidates"]).first.paragraph()
    assert "16 accumulated batches of 3 rows are 16 times 3 candidates, not 48" in paragraph


def test_a_rate_that_tore_weights_apart_is_named_though_later_steps_are_small():
    torn = (*steps([5.0] * 8, update=0.4), *steps(at_chance()[8:], update=1e-4))
    evidence = replace(STUCK, steps=tuple(replace(s, step=n + 1) for n, s in enumerate(torn)))
    collapsed = replace(STUCK.probes[1], spread=0.0, document_cosine=0.999)
    found = diagnose(replace(evidence, probes=(PROBE, collapsed)))
    assert [finding.cause for finding in found.findings][:2] == ["rate_too_high", "collapsed"]


def test_validation_that_stays_half_way_while_training_ends_is_learnt_by_heart():
    by_heart = replace(LEARNT, steps=steps(falling(0.02)))
    stands = diagnose(replace(by_heart, evaluations=validated([2.6, 2.4, 2.4, 2.4])))
    assert stands.first.cause == "over_fitting"
    follows = diagnose(replace(by_heart, evaluations=validated([3.6, 3.0, 2.6, 2.3])))
    assert follows.first.cause == HEALTHY


@pytest.mark.parametrize(
    ("share", "cause"),
    [(0.65, "temperature_floor"), (0.95, "temperature_too_high"), (0.2, HEALTHY)],
)
def test_what_room_a_temperature_leaves_to_the_loss_says_how_wrong_it_is(share, cause):
    losses = [(share + 1) / 2 * CHANCE] * 300
    assert diagnose(replace(LEARNT, steps=steps(losses, floor=share * CHANCE))).first.cause == cause


def test_a_model_that_ranks_is_not_called_stuck_for_its_loss():
    ranking = replace(LEARNT, steps=steps(at_chance(), accuracy=0.9))
    assert "not_started" not in {finding.cause for finding in diagnose(ranking).findings}


def test_labels_that_a_trained_model_learns_are_not_called_wrong():
    other_field = replace(PROBE, confident=0.8, loss=6.0)
    learning = replace(LEARNT, model=replace(MODEL, is_trained=True), probes=(other_field, TRAINED))
    assert diagnose(learning).first.cause == HEALTHY


def test_a_collapse_is_told_behind_what_it_comes_of():
    gone = replace(STUCK.probes[1], spread=0.001)
    wrong = CASES["wrong_labels"]
    found = diagnose(replace(wrong, probes=(wrong.probes[0], gone)))
    assert [finding.cause for finding in found.findings] == ["wrong_labels", "collapsed"]


def test_a_gradient_that_became_zero_by_a_collapse_is_no_dead_part():
    silent = replace(STUCK.steps[1].parts["layers"], gradient_norm=0.0)
    later = [replace(s, parts=s.parts | {"layers": silent}) for s in STUCK.steps[20:]]
    found = diagnose(replace(STUCK, steps=(*STUCK.steps[:20], *later)))
    assert "dead_part" not in {finding.cause for finding in found.findings}


def test_few_weights_that_move_enough_are_no_matter_of_the_rate():
    stays = replace(PROBE, step=300, document_distance=1e-3)
    held = replace(STUCK, model=replace(MODEL, trains={"norm": 2}, frozen={"layers": 200}))
    found = diagnose(replace(held, steps=steps(at_chance(), update=1e-3), probes=(PROBE, stays)))
    assert found.first.cause == "frozen_parts"
