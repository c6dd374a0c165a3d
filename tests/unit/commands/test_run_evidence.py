"""What a run notes of itself: facts before the first step, probes, and where a fault came from."""

import json
import math
import shutil

import pytest
import torch

from colfolio.commands import run_evidence
from colfolio.commands.run_evidence import PROBE_FILE, steps_between
from colfolio.commands.run_folder import RunFolder
from colfolio.commands.train import resume_command, train_command
from colfolio.diagnosis.causes import diagnose
from colfolio.diagnosis.preflight import Check
from colfolio.diagnosis.run_evidence import read_evidence
from colfolio.models import Retriever
from colfolio.models.contract import Source
from colfolio.training import newest_checkpoint


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


def break_off(recipe, *, unchecked=False):
    """A run that is killed after its third step."""
    append = RunFolder.append

    def kill(self, kind, values):
        append(self, kind, values)
        if (kind, values["step"]) == ("step", 3):
            raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append", kill)
        with pytest.raises(MemoryError):
            train_command(recipe, unchecked=unchecked)


def test_facts_stand_before_the_first_step_and_probes_at_both_ends(write_recipe, run):
    train_command(write_recipe())
    steps = [("step", number) for number in range(1, 7)]
    first = [(kind, 0) for kind in ("ledger", "checks", "facts", "probe")]
    assert kinds(run) == [*first, *steps, ("probe", 6)]
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
    assert (model.adapter_effect, model.fresh, model.is_trained) == (None, (), False)


@pytest.fixture
def drawn_base(monkeypatch, base_folder):
    """The projection is another one at every load of the base; checkpoints are read as they are."""
    load = Retriever.from_pretrained.__func__

    def drawing(cls, path, *arguments, **options):
        retriever = load(cls, path, *arguments, **options)
        if str(path) == str(base_folder):
            with torch.no_grad():
                retriever.projection.weight.normal_()
        return retriever

    monkeypatch.setattr(Retriever, "from_pretrained", classmethod(drawing))


@pytest.mark.usefixtures("drawn_base")
def test_a_projection_that_is_drawn_at_every_load_is_seen(write_recipe, run):
    train_command(write_recipe(), ["train.steps=1"], unchecked=True)
    evidence = read_evidence(run)
    assert evidence.model.fresh == ("custom_text_proj.weight",)
    assert diagnose(evidence).first.cause == "fresh_tensors"


@pytest.mark.usefixtures("drawn_base")
def test_a_run_that_goes_on_still_says_that_its_base_was_drawn(write_recipe, run):
    break_off(write_recipe(), unchecked=True)
    resume_command(run)
    assert read_evidence(run).model.fresh == ("custom_text_proj.weight",)


def test_a_run_that_goes_on_needs_its_base_no_more(write_recipe, run, tmp_path, base_folder):
    base = shutil.copytree(base_folder, tmp_path / "base")
    break_off(write_recipe(model=str(base)))
    shutil.rmtree(base)
    resume_command(run)
    assert read_evidence(run).model.fresh == ()


def test_weights_that_are_not_read_twice_are_not_said_to_be_alike(write_recipe, run, monkeypatch):
    monkeypatch.setattr(run_evidence, "can_reload", lambda _: False)
    train_command(write_recipe(), ["train.steps=1"])
    evidence = read_evidence(run)
    assert evidence.model.fresh is None
    found = diagnose(evidence)
    assert "fresh_tensors" in found.unasked


def test_of_a_split_without_a_probe_nothing_is_said_that_takes_one(write_recipe, run, monkeypatch):
    monkeypatch.setattr(run_evidence, "draw_probe", lambda *_: None)
    train_command(write_recipe(), ["train.steps=1"])
    evidence = read_evidence(run)
    model = evidence.model
    assert (model.positions, model.template_faults, model.row_difference) == (None, None, None)
    assert evidence.data.truncated is None
    ruled_out = {each.cause for each in diagnose(evidence).ruled_out}
    assert not ruled_out & {"positions", "wrong_template", "padding_side", "truncated_images"}


def test_a_base_from_published_weights_has_a_projection_that_was_drawn(
    write_recipe, run, tmp_path, retriever
):
    source = Source(name="org/backbone")
    retriever.contract = retriever.contract.model_copy(update={"source": source})
    retriever.save_pretrained(tmp_path / "base")
    frozen = "train.frozen=[vision, merger, embedding, layers, projection]"
    train_command(write_recipe(model=str(tmp_path / "base")), ["train.steps=1", frozen])
    model = read_evidence(run).model
    assert (model.is_trained, model.drawn) == (False, ("projection",))


def test_each_check_before_the_first_step_stands_in_the_log(write_recipe, run):
    train_command(write_recipe(), ["train.steps=1"])
    (row,) = [row for row in log_of(run) if row["kind"] == "checks"]
    assert all(each["passed"] and each["told"] for each in row["checks"])
    assert row["checks"][0]["name"] == "weights are those of the files"


@pytest.mark.usefixtures("drawn_base")
def test_a_check_that_failed_stands_in_the_log_of_a_run_that_goes_on_all_the_same(
    write_recipe, run
):
    break_off(write_recipe(), unchecked=True)
    resume_command(run)
    (row,) = [row for row in log_of(run) if row["kind"] == "checks"]
    (failed,) = [each for each in row["checks"] if not each["passed"]]
    assert failed["cause"] == "fresh_tensors"
    assert "custom_text_proj.weight" in failed["told"]


def test_a_check_that_was_passed_over_is_what_a_diagnosis_names(write_recipe, run, monkeypatch):
    found = Check("templates", passed=False, told="other strings", cause="wrong_template")
    monkeypatch.setattr("colfolio.commands.check.check_first", lambda *_: [found])
    train_command(write_recipe(), ["train.steps=1"], unchecked=True)
    first = diagnose(read_evidence(run)).first
    assert (first.cause, first.evidence) == ("wrong_template", ("other strings.",))


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
    assert (fault.step, fault.what, fault.module) == (0, "loss", broken)


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
    assert read_evidence(run).fault.step == 4  # the last that was done
    resume_command(run)
    assert read_evidence(run).fault is None
    assert len(read_evidence(run).steps) == 6


def test_adapters_on_a_trained_base_are_its_own_also_once_the_run_goes_on(
    write_recipe, run, tmp_path
):
    train_command(write_recipe(out=str(tmp_path / "trained")))
    given = {"model": str(tmp_path / "trained" / "model")}
    lora = ["train.lora.rank=2", "checkpoint.every=3"]
    train_command(write_recipe(**given), lora)
    shutil.rmtree(newest_checkpoint(run / "checkpoints"))
    resume_command(run)
    model = read_evidence(run).model
    assert model.adapter_is_of_base is not False
    assert model.adapter_effect > 0
