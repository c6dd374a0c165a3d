"""Each cause is named from numbers that mean it, and from a healthy run's numbers none is."""

import math
from dataclasses import replace

import pytest
from known_runs import (
    CASES,
    CHANCE,
    DATA,
    LEARNT,
    MODEL,
    PROBE,
    SETTLED,
    STUCK,
    TRAINED,
    at_chance,
    falling,
    steps,
    validated,
)

from colfolio.diagnosis.causes import HEALTHY, UNKNOWN, diagnose
from colfolio.diagnosis.evidence import Evidence, ModelFacts, Settled
from colfolio.diagnosis.training_log import LoggedStep


def test_a_run_that_learns_has_no_cause_and_each_was_looked_for():
    found = diagnose(replace(LEARNT, evaluations=validated([2.0, 1.0, 0.8])))
    assert [finding.cause for finding in found.findings] == [HEALTHY]
    assert not set(found.unasked) - {
        "adapter_not_loaded",
        "pairwise_loss",
        "wrong_labels",
    }  # not of it
    assert len(found.ruled_out) > 20


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


@pytest.mark.parametrize(("first", "cause"), [(1.1, "collapsed"), (0.6932, "pairwise_loss")])
def test_a_pairwise_loss_that_stands_at_ln_2_in_another_trainers_log_is_blamed(first, cause):
    losses = [first] * 20 + [math.log(2) + 1e-4 * (number % 2) for number in range(180)]
    logged = tuple(
        LoggedStep(number + 1, loss, math.log(2), None, None, None)
        for number, loss in enumerate(losses)
    )
    found = diagnose(Evidence(Settled("pairwise", rows=3), logged))
    assert found.first.cause == cause
    assert found.first.change == {"train.loss.kind": "info_nce", "train.batch.rows": "128"}


def test_what_is_measured_directly_comes_before_what_is_inferred():
    held = replace(MODEL, trains={"projection": 20}, frozen={"layers": 200})
    both = replace(STUCK, model=held, data=replace(DATA, epoch_overlap=1.0))
    causes = [finding.cause for finding in diagnose(both).findings]
    assert causes == ["fixed_order", "frozen_parts"]


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
    later = [replace(s, parts={**s.parts, "layers": silent}) for s in STUCK.steps[20:]]
    found = diagnose(replace(STUCK, steps=(*STUCK.steps[:20], *later)))
    assert "dead_part" not in {finding.cause for finding in found.findings}


def test_few_weights_that_move_enough_are_no_matter_of_the_rate():
    stays = replace(PROBE, step=300, document_distance=1e-3)
    held = replace(STUCK, model=replace(MODEL, trains={"norm": 2}, frozen={"layers": 200}))
    found = diagnose(replace(held, steps=steps(at_chance(), update=1e-3), probes=(PROBE, stays)))
    assert found.first.cause == "frozen_parts"


def test_what_was_not_measured_is_neither_found_nor_ruled_out():
    unmeasured = ModelFacts(trains=MODEL.trains)
    found = diagnose(replace(LEARNT, model=unmeasured, data=replace(DATA, truncated=None)))
    assert [finding.cause for finding in found.findings] == [HEALTHY]
    unknown = {"fresh_tensors", "positions", "wrong_template", "padding_side", "truncated_images"}
    unknown.add("frozen_parts")
    assert not unknown & {each.cause for each in found.ruled_out}
    assert {"fresh_tensors", "positions", "frozen_parts"} <= set(found.unasked)


def test_of_frozen_parts_those_are_named_that_are_as_they_were_drawn():
    held = {"layers": 150, "projection": 10}
    published = replace(MODEL, trains={"norm": 40}, frozen=held, drawn=("projection",))
    first = diagnose(replace(STUCK, model=published)).first
    assert first.cause == "frozen_parts"
    assert first.title == "projection must learn and cannot: frozen at random weights"
    assert "5% of the parameters" in first.paragraph()
    trained = replace(published, drawn=())
    assert diagnose(replace(STUCK, model=trained)).first.cause == "not_started"


@pytest.mark.parametrize(
    ("precision", "difference", "is_found"),
    [("fp32", 1e-3, True), ("bf16", 1e-3, False), ("bf16", 0.2, True), (None, 1e-3, False)],
)
def test_a_row_that_depends_on_others_is_found_beyond_the_rounding_of_a_precision(
    precision, difference, is_found
):
    settled = replace(SETTLED, precision=precision)
    facts = replace(MODEL, row_difference=difference)
    found = diagnose(replace(LEARNT, settled=settled, model=facts))
    assert (found.first.cause == "padding_side") == is_found
    unknown = diagnose(replace(LEARNT, model=replace(MODEL, row_difference=math.nan)))
    assert "padding_side" not in {each.cause for each in (*unknown.findings, *unknown.ruled_out)}
