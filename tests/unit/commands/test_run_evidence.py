"""What a run notes of itself: facts before the first step, probes, and where a fault came from."""

import json
import math

import pytest
import torch

from colfolio.commands import run_evidence
from colfolio.commands.run_evidence import PROBE_FILE, steps_between
from colfolio.commands.run_folder import RunFolder
from colfolio.commands.train import resume_command, train_command
from colfolio.diagnosis.run_evidence import read_evidence
from colfolio.models import Retriever


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
    monkeypatch.setattr("colfolio.commands.run_steps.write_run_report", lambda *_: None)


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def kinds(run):
    return [(row["kind"], row["step"]) for row in log_of(run) if row["kind"] != "evaluation"]


def break_off(recipe):
    """A run that is killed after its third step."""
    append = RunFolder.append

    def kill(self, kind, values):
        append(self, kind, values)
        if (kind, values["step"]) == ("step", 3):
            raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append", kill)
        with pytest.raises(MemoryError):
            train_command(recipe)


def test_facts_stand_before_the_first_step_and_probes_at_both_ends(write_recipe, run):
    train_command(write_recipe())
    steps = [("step", number) for number in range(1, 7)]
    assert kinds(run) == [("ledger", 0), ("facts", 0), ("probe", 0), *steps, ("probe", 6)]
    evidence = read_evidence(run)
    assert (evidence.settled.loss, evidence.settled.rows, evidence.settled.precision) == (
        "info_nce",
        6,
        "fp32",
    )
    assert (evidence.data.queries, evidence.data.validation_documents) == (24, 12)
    assert (evidence.data.leaked, evidence.data.copies, evidence.data.truncated) == (0, 0, 0)
    assert evidence.model.positions == "right"
    assert (evidence.model.fresh, evidence.model.template_faults) == ((), ())
    assert not evidence.model.is_trained
    first, last = evidence.probes
    assert first.query_distance == pytest.approx(0, abs=1e-9)
    assert last.query_distance > 0.001
    assert evidence.fault is None


def test_the_cadence_keeps_the_probe_below_a_hundredth_of_the_steps():
    for rows in (1.0, 8.0, 31.5, 32.0, 500.0):
        every = steps_between(32, rows, is_whole=True)
        assert every >= 15
        # forwards of the probe's rows, and of the steps in between, of which each is three
        assert 32 / (every * 3 * rows) <= 0.01
    assert steps_between(32, 32.0, is_whole=False) == 100


def test_a_run_that_goes_on_measures_from_the_same_beginning(write_recipe, run, tmp_path):
    train_command(write_recipe(out=str(tmp_path / "whole")))
    break_off(write_recipe())
    resume_command(run)
    whole, resumed = (read_evidence(each) for each in (tmp_path / "whole", run))
    assert whole.probes == resumed.probes
    assert [row["kind"] for row in log_of(run)].count("facts") == 1


def test_a_run_whose_first_vectors_are_lost_tells_no_false_distance(write_recipe, run):
    break_off(write_recipe())
    (run / PROBE_FILE).unlink()
    resume_command(run)
    assert math.isnan(read_evidence(run).probes[-1].query_distance)


def test_a_run_of_adapters_notes_them(write_recipe, run):
    train_command(write_recipe(), ["train.lora={rank: 2}", "train.steps=2"])
    model = read_evidence(run).model
    assert set(model.trains) == {"adapters"}
    assert (model.adapter_effect, model.is_reloaded_alike, model.is_trained) == (None, True, False)


def test_a_projection_that_is_drawn_at_every_load_is_seen(write_recipe, run, monkeypatch):
    load = Retriever.from_pretrained.__func__

    def drawing(cls, *arguments, **options):
        retriever = load(cls, *arguments, **options)
        with torch.no_grad():
            retriever.projection.weight.normal_()
        return retriever

    monkeypatch.setattr(Retriever, "from_pretrained", classmethod(drawing))
    train_command(write_recipe(), ["train.steps=1"], unchecked=True)
    model = read_evidence(run).model
    assert model.fresh == ("custom_text_proj.weight",)
    assert not model.is_reloaded_alike


def test_a_frozen_layer_that_breaks_is_named_in_log_and_error(write_recipe, run, monkeypatch):
    broken = "backbone.visual.blocks.1.mlp.fc2"
    start = run_evidence.RunEvidence.begin

    def break_it(self):
        start(self)
        with torch.no_grad():
            self._state.model.get_submodule(broken).weight[0] = float("nan")

    monkeypatch.setattr(run_evidence.RunEvidence, "begin", break_it)
    with pytest.raises(FloatingPointError, match=f"step 1: loss nan.*that of {broken}"):
        train_command(write_recipe(), ["train.frozen=[vision]"])
    fault = read_evidence(run).fault
    assert (fault.step, fault.what, fault.module) == (1, "loss", broken)


def test_a_step_that_destroyed_the_weights_is_a_fault_without_a_false_name(
    write_recipe, run, monkeypatch
):
    measured = run_evidence.find_fault
    monkeypatch.setattr(
        run_evidence,
        "find_fault",
        lambda model, again: (_destroy(model), measured(model, again))[1],
    )
    start = run_evidence.RunEvidence.begin

    def break_it(self):
        start(self)
        with torch.no_grad():
            self._state.model.projection.weight.fill_(float("nan"))

    monkeypatch.setattr(run_evidence.RunEvidence, "begin", break_it)
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        train_command(write_recipe())
    assert read_evidence(run).fault.module == ""


def _destroy(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))


def test_a_fault_is_forgotten_by_a_run_that_goes_on_without_it(write_recipe, run, monkeypatch):
    report = "colfolio.training.loop._report"
    from colfolio.training import loop

    told = loop._report

    def break_once(state, *rest):
        if state.step == 5:
            raise FloatingPointError("step 5: loss nan")
        return told(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(report, break_once)
        with pytest.raises(FloatingPointError):
            train_command(write_recipe())
    assert read_evidence(run).fault.step == 5
    resume_command(run)
    assert read_evidence(run).fault is None
    assert len(read_evidence(run).steps) == 6
