"""A plateau is named once and while it lasts; a slow start and a loss that falls are let be."""

import math
from dataclasses import replace

import pytest
from known_runs import CHANCE, PROBE, ROWS

from colfolio.diagnosis.causes import diagnose
from colfolio.diagnosis.evidence import DataFacts, Evidence, Settled
from colfolio.diagnosis.plateau import PlateauWatch, is_due, named_plateaus
from colfolio.diagnosis.training_log import LoggedPart, LoggedStep, TrainingLog

STEPS = 1000
SOUND = DataFacts(queries=2000, documents=2000, validation_documents=100)


def step(number, loss):
    part = LoggedPart(1e-3, 0.5, 1e-3)
    return LoggedStep(
        number, loss, CHANCE, 0.0, 1e-3, 100.0, float(ROWS), 0.0, floor=0.0, parts={"layers": part}
    )


def evidence(losses, spread=0.5, data=SOUND, warmup=20, candidates=float(ROWS)):
    """What a run says after so many losses; its probe's scores spread by `spread` now."""
    probe = replace(PROBE, step=len(losses), spread=spread, document_distance=0.2)
    return Evidence(
        Settled("info_nce", lr=1e-3, steps=STEPS, warmup_steps=warmup, rows=ROWS),
        tuple(step(number, loss) for number, loss in enumerate(losses, start=1)),
        (),
        (PROBE, probe) if losses else (PROBE,),
        data,
        candidates=candidates,
        masked=0.0,
    )


def said(watch, losses, **others):
    """(step, cause) of all that a watch says of a run, looked at as `train` does."""
    found = []
    for number in range(len(losses) + 1):
        if is_due(number, STEPS):
            finding = watch.see(evidence(losses[:number], **others))
            if finding is not None:
                found.append((number, finding.cause))
    return found


def at_chance(count, noise=0.05):
    return [CHANCE + noise * math.sin(1.7 * number) for number in range(count)]


def falling(count, after=0):
    return at_chance(after) + [
        0.4 + (CHANCE - 0.4) * math.exp(-number / 150) + 0.05 * math.sin(1.7 * number)
        for number in range(count)
    ]


def test_a_loss_that_falls_is_let_be():
    assert said(PlateauWatch(), falling(STEPS)) == []


def test_a_weakness_is_not_named_while_the_loss_falls_all_the_same():
    sinking = [CHANCE - 3.5 * number / STEPS for number in range(STEPS)]
    assert said(PlateauWatch(), sinking, candidates=4.0) == []
    standing = [2.0 + 0.05 * math.sin(1.7 * number) for number in range(STEPS)]
    ((_, cause),) = said(PlateauWatch(), standing, candidates=4.0)
    assert cause == "few_candidates"


def test_a_slow_start_is_let_be():
    assert said(PlateauWatch(), falling(STEPS - 200, after=200)) == []


def test_a_collapse_is_named_once_while_it_lasts():
    ((when, cause),) = said(PlateauWatch(), at_chance(STEPS, noise=1e-4), spread=0.001)
    assert cause == "collapsed"
    assert 70 <= when <= 200


def test_a_pairwise_loss_near_ln_2_is_called_the_same_after_each_number_of_steps():
    watch = PlateauWatch()
    for number in (100, 150, 400):
        losses = [0.69 + 0.02 * math.sin(1.7 * each) for each in range(number)]
        seen = evidence(losses, spread=0.24)
        pairwise = replace(
            seen,
            settled=replace(seen.settled, loss="pairwise"),
            steps=tuple(replace(each, chance=math.log(2)) for each in seen.steps),
        )
        assert diagnose(pairwise).first.cause == "pairwise_loss"
        said_now = watch.see(pairwise)
        assert (said_now is not None) == (number == 150)


def test_a_loss_that_never_leaves_chance_is_said_once_after_some_hundred_steps():
    watch = PlateauWatch()
    ((when, cause),) = said(watch, at_chance(STEPS))
    assert cause == "not_started"
    assert when >= 200


def test_a_plateau_is_not_named_before_warm_up_is_over():
    ((when, _),) = said(PlateauWatch(), at_chance(STEPS, noise=1e-4), spread=0.001, warmup=400)
    assert when >= 450


def test_what_is_certain_before_the_first_step_is_said_at_once_and_once():
    data = replace(SOUND, leaked=0.4)
    assert said(PlateauWatch(), falling(STEPS), data=data) == [(0, "leaked_split")]


def test_a_plateau_is_named_beside_what_was_known_from_the_start():
    data = replace(SOUND, epoch_overlap=1.0)  # its rule stands before that of a collapse
    found = said(PlateauWatch(), at_chance(STEPS, noise=1e-4), data=data, spread=0.001)
    assert [cause for _, cause in found] == ["fixed_order", "collapsed"]


def test_a_run_that_goes_on_does_not_say_again_what_its_log_says():
    row = {"step": 120, "cause": "collapsed", "told": "The model has collapsed. 0.69. Begin again."}
    (named,) = named_plateaus(TrainingLog((), (), diagnoses=(row, {"step": 3})))
    assert (named.step, named.cause, named.title) == (120, "collapsed", "The model has collapsed")
    assert said(PlateauWatch([named]), at_chance(STEPS, noise=1e-4), spread=0.001) == []


def test_a_cause_that_shows_in_one_look_alone_is_not_named():
    watch = PlateauWatch()
    stuck = evidence(at_chance(300, noise=1e-4), spread=0.001)
    assert watch.see(stuck) is None
    assert watch.see(evidence(falling(300))) is None
    assert watch.see(stuck) is None
    assert watch.see(stuck).cause == "collapsed"


@pytest.mark.parametrize(("steps", "most"), [(10, 1), (100, 6), (2000, 26), (100_000, 26)])
def test_a_run_is_looked_at_some_times_however_long_it_is(steps, most):
    assert sum(is_due(number, steps) for number in range(steps + 1)) <= most
