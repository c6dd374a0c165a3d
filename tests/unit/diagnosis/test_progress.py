"""Healthy is what learnt or was good before; what is told to be changed mends, and is told once."""

import math
from dataclasses import replace

import known_runs
import pytest
import yaml
from known_runs import (
    CASES,
    CHANCE,
    DATA,
    LEARNT,
    MODEL,
    PROBE,
    ROWS,
    SETTLED,
    STUCK,
    TRAINED,
    at_chance,
    falling,
    steps,
)

from colfolio.commands.run_folder import TrainRecipe
from colfolio.config import load_settings
from colfolio.diagnosis.causes import HEALTHY, UNKNOWN, diagnose
from colfolio.diagnosis.evidence import Evidence, Settled
from colfolio.diagnosis.training_log import LoggedStep
from colfolio.training.start import check_settings

THAW = [{"step": 75, "open": ["vision"], "lr": 1e-3}]
STAYED = (replace(PROBE, loss=2.9, accuracy=0.4), replace(PROBE, step=300, loss=2.9, accuracy=0.4))


def standing(**others):
    """A base that ranks a little, and a loss that stays where it began."""
    logged = steps([0.8 * loss for loss in at_chance()], accuracy=0.4, **others)
    return replace(STUCK, steps=logged, probes=STAYED)


def test_steps_that_change_nothing_are_named_though_the_base_is_not_at_chance():
    still = standing(update=1e-7, lr=1e-7)
    found = diagnose(still)
    assert found.first.cause == "rate_too_low"
    assert found.first.change == {"train.optimiser.lr": "1.0e-03"}
    warming = replace(still, settled=replace(SETTLED, warmup_steps=5000))
    assert diagnose(warming).first.cause == "warmup_too_long"


def test_a_loss_that_stays_where_it_began_is_not_called_healthy():
    assert diagnose(standing()).first.cause == UNKNOWN
    few = replace(standing(), steps=standing().steps[:100])
    assert diagnose(few).first.cause == "not_started"


def test_a_model_that_ranked_well_from_the_start_is_healthy_though_it_changes_little():
    good = (replace(TRAINED, step=0), TRAINED)
    for update in (1e-3, 1e-9):
        logged = steps([0.4 + 0.02 * math.sin(number) for number in range(300)], update=update)
        found = diagnose(replace(LEARNT, steps=logged, probes=good))
        assert found.first.cause == HEALTHY
        assert "was good before" in found.first.title


def test_a_loss_of_another_trainer_that_never_fell_is_not_called_healthy():
    logged = [
        LoggedStep(10 * number + 10, 0.69 + 0.004 * math.sin(7 * number), CHANCE, None, None, None)
        for number in range(50)
    ]
    found = diagnose(Evidence(Settled("info_nce", rows=ROWS), tuple(logged)))
    assert found.first.cause == UNKNOWN


def test_a_rate_is_changed_by_how_far_steps_are_from_the_usual_size():
    high = diagnose(replace(STUCK, steps=steps(at_chance(), update=0.5, lr=0.2))).first
    assert high.change == {"train.optimiser.lr": "4.0e-04"}
    low = replace(CASES["rate_too_low"], steps=steps(at_chance(), update=1e-6, lr=1e-7))
    assert diagnose(low).first.change == {"train.optimiser.lr": "1.0e-04"}


def test_numbers_that_broke_after_steps_too_large_ask_for_a_lower_rate():
    torn = replace(
        CASES["not_finite"],
        settled=replace(SETTLED, precision="fp16"),
        steps=steps(at_chance(), update=0.5, lr=0.2),
    )
    assert diagnose(torn).first.change == {"train.optimiser.lr": "4.0e-04"}
    calm = replace(CASES["not_finite"], settled=replace(SETTLED, precision="fp16"))
    assert diagnose(calm).first.change == {"train.precision": "fp32"}


@pytest.mark.parametrize("thaw", [[], THAW])
@pytest.mark.parametrize("cause", CASES)
def test_no_change_is_refused_by_a_recipe_with_stages_or_without(tmp_path, cause, thaw):
    train = {"steps": 300, "thaw": thaw, "frozen": ["vision"], "batch": {"rows": 8}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": "M", "dataset": "D", "out": "O", "train": train}))
    overrides = [f"{key}={value}" for key, value in diagnose(CASES[cause]).first.change.items()]
    train_settings = load_settings(recipe, TrainRecipe, overrides).train
    check_settings(train_settings)
    assert train_settings.frozen or not train_settings.thaw


def test_steps_are_not_cut_before_the_last_stage_opens():
    asked = CASES["over_fitting"]  # which was best at step 200
    assert diagnose(asked).first.change == {"train.steps": "200"}
    for opened, change in ((100, {"train.steps": "200"}), (250, {})):
        logged = tuple(
            replace(step, opened=("vision",) if step.step == opened else ()) for step in asked.steps
        )
        first = diagnose(replace(asked, steps=logged)).first
        assert (first.cause, first.change) == ("over_fitting", change)
        assert ("opened with step 250" in first.action) == (not change)


@pytest.mark.parametrize(("warmup", "cause"), [(100_000, "warmup_too_long"), (20, HEALTHY)])
def test_a_loss_that_falls_a_little_in_a_warm_up_without_end_is_not_healthy(warmup, cause):
    logged = steps([0.97 * CHANCE - 0.0015 * n for n in range(300)], accuracy=0.05, lr=3e-6)
    probes = (PROBE, replace(PROBE, step=300, loss=3.3, document_distance=0.02))
    settled = replace(SETTLED, warmup_steps=warmup)
    found = diagnose(replace(LEARNT, settled=settled, steps=logged, probes=probes))
    assert found.first.cause == cause
    learnt = diagnose(replace(LEARNT, settled=settled, steps=steps(falling(), lr=3e-6)))
    assert learnt.first.cause == HEALTHY


def test_a_temperature_that_leaves_no_room_stands_before_the_ranks_that_it_cost():
    base, now = replace(TRAINED, step=0, loss=3.2, spread=2.1), replace(TRAINED, loss=3.1)
    probes = (base, replace(now, accuracy=0.5))
    settled = replace(SETTLED, temperature=25.0)
    logged = steps([0.9 * CHANCE] * 300, floor=0.81 * CHANCE, accuracy=0.41)
    floor, lost = diagnose(
        replace(LEARNT, settled=settled, steps=logged, probes=probes, candidates=float(ROWS))
    ).findings
    assert (floor.cause, lost.cause) == ("temperature_floor", "forgetting")
    assert floor.change == {"train.loss.temperature": "2.1"}
    assert lost.change == {}
    assert "fell nevertheless, from 3.200 to 3.100" in lost.paragraph()
    assert "ranks worse" in lost.title


@pytest.mark.parametrize(("is_of_base", "told"), [(None, False), (True, True)])
def test_of_adapters_only_what_was_measured_is_told(is_of_base, told):
    facts = replace(MODEL, adapter_effect=0.5, adapter_is_of_base=is_of_base)
    ruled_out = {each.cause: each.why for each in diagnose(replace(LEARNT, model=facts)).ruled_out}
    assert "change the vectors" in ruled_out["adapter_not_loaded"]
    assert ("name this base" in ruled_out["adapter_not_loaded"]) == told


def test_of_a_model_that_never_began_it_is_not_said_that_it_had():
    ruled_out = {each.cause: each.why for each in diagnose(CASES["collapsed"]).ruled_out}
    assert ruled_out["not_started"].startswith("scores have lost their spread")


def test_no_setting_is_given_two_values():
    torn = replace(CASES["not_finite"], steps=steps(at_chance(), update=0.5))
    found = diagnose(replace(torn, candidates=2.0, settled=replace(SETTLED, rows=2))).findings
    assert {"not_finite", "rate_too_high", "few_candidates"} <= {each.cause for each in found}
    assert [each.cause for each in found if each.change] == ["not_finite", "few_candidates"]


def test_what_comes_of_another_cause_is_mended_with_it():
    gone = replace(STUCK.probes[1], spread=0.001)
    wrong = CASES["wrong_labels"]
    _, collapsed = diagnose(replace(wrong, probes=(wrong.probes[0], gone))).findings
    assert (collapsed.cause, collapsed.change) == ("collapsed", {})
    assert diagnose(CASES["collapsed"]).first.change


def test_rows_are_raised_no_further_than_there_are_queries():
    few = replace(CASES["few_candidates"], data=replace(DATA, queries=12))
    change = {"train.batch.rows": "12", "train.accumulation": "1"}
    assert diagnose(few).first.change == change
    masked = replace(CASES["few_candidates"], candidates=7.96)
    assert diagnose(masked).first.cause == HEALTHY


def test_a_collapse_is_certain_only_where_gradients_are_gone_as_well():
    alive = diagnose(CASES["collapsed"]).first
    assert alive.sureness == "likely"
    assert "Go on" in alive.action
    silent = replace(STUCK.steps[1].parts["layers"], gradient_norm=1e-6)
    parts = {"layers": silent, "projection": silent}
    later = [replace(step, parts=parts) for step in STUCK.steps[20:]]
    dead = diagnose(replace(CASES["collapsed"], steps=(*STUCK.steps[:20], *later))).first
    assert dead.sureness == "certain"
    assert "Go on" not in dead.action


def test_a_batch_of_two_that_has_collapsed_is_told_to_take_more_rows():
    collapsed = replace(CASES["collapsed"], settled=replace(SETTLED, rows=2), candidates=2.0)
    found = diagnose(collapsed)
    assert [each.cause for each in found.findings] == ["few_candidates", "collapsed"]
    pairwise = replace(collapsed.settled, loss="pairwise")
    assert diagnose(replace(collapsed, settled=pairwise)).first.cause == "collapsed"


def test_the_pairwise_loss_is_blamed_near_ln_2_and_not_on_a_trained_base():
    stands = CASES["pairwise_loss"]
    assert diagnose(stands).first.change["train.loss.kind"] == "info_nce"
    trained = replace(stands, model=replace(MODEL, is_trained=True))
    assert "pairwise_loss" not in {each.cause for each in diagnose(trained).findings}
    above = steps([1.1] * 300, accuracy=0.02, chance=math.log(2))
    assert diagnose(replace(stands, steps=above)).first.cause == "not_started"


def test_labels_are_judged_by_ranks_where_the_loss_begins_above_chance_by_itself():
    first = replace(PROBE, confident=0.4)
    asked = replace(
        CASES["pairwise_loss"],
        model=replace(MODEL, is_trained=True),
        probes=(first, STUCK.probes[1]),
    )
    assert diagnose(asked).first.cause == "wrong_labels"
    other_field = replace(first, confident=0.06, rank=7.8)
    found = diagnose(replace(asked, probes=(other_field, STUCK.probes[1])))
    assert "wrong_labels" in {each.cause for each in found.ruled_out}


def test_a_base_that_is_only_as_bad_as_chance_cannot_forget():
    drawn = replace(CASES["collapsed"], probes=(PROBE, replace(PROBE, step=300, accuracy=0.0)))
    assert "forgetting" not in {each.cause for each in diagnose(drawn).findings}


def test_a_rising_loss_without_a_probe_is_forgetting():
    rising = [1.0 + 0.003 * number for number in range(300)]
    found = diagnose(Evidence(SETTLED, steps(rising)))
    assert found.first.cause == "forgetting"
    assert found.first.sureness == "likely"


def test_waiting_is_advised_beside_no_other_cause():
    for cause, evidence in CASES.items():
        causes = {each.cause for each in diagnose(evidence).findings}
        assert cause == "not_started" or "not_started" not in causes, causes
    leaked = replace(STUCK, data=replace(DATA, leaked=0.5))
    assert {each.cause for each in diagnose(leaked).findings} == {"leaked_split", "not_started"}


def test_nothing_is_ruled_out_by_steps_that_were_not_made():
    found = diagnose(replace(LEARNT, steps=(), probes=(PROBE,)))
    assert {"not_finite", "overflow"} <= set(found.unasked)
    assert "not certain" not in found.first.paragraph()
    assert "explains it better" not in found.first.paragraph()


def test_adapters_beside_random_weights_are_not_told_to_open_what_is_open():
    held = replace(MODEL, trains={"adapters": 20}, frozen={"projection": 20, "layers": 200})
    projection = diagnose(replace(STUCK, model=replace(held, drawn=("projection",)))).first
    assert projection.change == {"train.lora.projection": "full", "train.thaw": "[]"}
    all_of_it = diagnose(replace(STUCK, model=replace(held, drawn=("projection", "layers")))).first
    assert (all_of_it.cause, all_of_it.change) == ("frozen_parts", {})


def test_positions_with_a_fault_of_a_later_version_are_told_as_such():
    found = diagnose(replace(LEARNT, model=replace(MODEL, positions="new_fault"))).first
    assert found.cause == "positions_new_fault"
    assert "of which no more is known: new fault" in found.title


def test_frozen_parts_are_named_also_where_the_loss_began_below_chance():
    begun = known_runs.CHANCE * 0.8
    losses = [begun + 0.01 * math.sin(1.7 * number) for number in range(300)]
    probe = replace(known_runs.PROBE, loss=2.8)
    frozen = replace(known_runs.MODEL, trains={"projection": 20}, frozen={"layers": 200})
    evidence = replace(
        known_runs.STUCK,
        model=frozen,
        steps=known_runs.steps(losses, accuracy=0.05),
        probes=(probe, replace(probe, step=300, query_distance=0.1, document_distance=0.1)),
    )
    assert diagnose(evidence).first.cause == "frozen_parts"
