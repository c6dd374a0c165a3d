"""A check that failed before the first step is told by the diagnosis of a run begun in spite."""

from dataclasses import replace

import pytest

from colfolio.diagnosis.causes import HEALTHY, diagnose
from colfolio.diagnosis.evidence import Checked, Evidence, ModelFacts, Settled
from colfolio.diagnosis.training_log import LoggedPart, LoggedStep

DEAD = Checked("gradient", passed=False, told="none comes to vision", cause="dead_part")
PASSED = replace(DEAD, passed=True)
SETTLED = Settled("info_nce", rows=8)


def steps(loss, gradient):
    part = LoggedPart(1e-3, 1.0, 1e-3)
    parts = {"vision": replace(part, gradient_norm=gradient), "layers": part}
    accuracy = 0.9 if loss < 1 else 0.1
    losses = [loss + 0.01 * (number % 3) for number in range(100)]
    return tuple(
        LoggedStep(n + 1, each, 2.08, 0.0, 1e-3, 9.0, 8.0, 0.0, False, 0.0, accuracy, parts)
        for n, each in enumerate(losses)
    )


def causes(evidence):
    return [finding.cause for finding in diagnose(evidence).findings]


def test_a_run_that_died_before_its_first_step_is_told_what_had_failed():
    first = diagnose(Evidence(SETTLED, checks=(PASSED, DEAD))).first
    assert (first.cause, first.sureness) == ("dead_part", "certain")
    told = 'The check "gradient" failed before the first step, and was passed over. '
    assert first.paragraph().startswith(told + "none comes to vision. ")


def test_a_check_that_passed_is_no_finding():
    assert causes(Evidence(SETTLED, steps(0.4, 1.0), checks=(PASSED,))) == [HEALTHY]


def test_a_cause_that_is_found_otherwise_is_told_once():
    found = diagnose(Evidence(SETTLED, steps(2.1, 0.0), checks=(DEAD,)))
    (dead,) = [finding for finding in found.findings if finding.cause == "dead_part"]
    assert dead.title.startswith("no gradient reaches vision")


@pytest.mark.parametrize(("loss", "is_told"), [(0.4, False), (2.08, True)])
def test_what_the_run_ruled_out_since_is_told_only_if_it_does_not_learn(loss, is_told):
    found = diagnose(Evidence(SETTLED, steps(loss, 1.0), checks=(DEAD,)))
    assert ("dead_part" in {each.cause for each in found.findings}) == is_told
    assert ("dead_part" in {each.cause for each in found.ruled_out}) != is_told


def test_a_failure_without_a_cause_has_a_name_too():
    evidence = Evidence(SETTLED, steps(0.4, 1.0), checks=(replace(DEAD, cause=""),))
    assert causes(evidence) == ["failed_check"]


def test_what_is_measured_directly_otherwise_comes_first():
    flat = Evidence(SETTLED, steps(2.08, 1.0), model=ModelFacts(positions="flattened"))
    assert causes(replace(flat, checks=(DEAD,)))[:2] == ["positions_flattened", "dead_part"]
