"""A run folder becomes evidence, wherever the run stopped and whichever version wrote it."""

import json
from dataclasses import asdict

import pytest
import yaml

from colfolio.diagnosis.evidence import (
    Checked,
    DataFacts,
    Fault,
    ModelFacts,
    ProbeSignals,
    Settled,
)
from colfolio.diagnosis.ledgers.ledger import Ledger, Range
from colfolio.diagnosis.run_evidence import evidence_of_log, read_evidence, settled_of
from colfolio.diagnosis.training_log import read_log
from colfolio.errors import ColfolioError
from colfolio.training import TrainSettings

SETTLED = Settled("pairwise", 0.5, 1e-3, 100, 10, 32, 2, 4, "bf16", "page")
DATA = DataFacts(100, 90, median_document_tokens=17.0, copies=0.1, validation_documents=12)
MODEL = ModelFacts(
    "flattened", "told", ("one fault",), 0.5, ("a.b",), trains={"norm": 3}, drawn=("norm",)
)
PROBE = ProbeSignals(
    0, 20, 3.0, 2.9, 0.0, -1.0, 0.1, 9.5, 0.05, 1.5, 0.2, 0.3, 7.0, 8.0, 16, 0.1, 0.0, 0.0, 1, 0.2,
    0.0, 0.9, 1e-6, ((1, 2), (3, 4)), (-1.0, 2.0),
)  # fmt: skip
FAULT = Fault(7, "loss", "backbone.norm")
LEDGER = Ledger(
    batches=8,
    ranks=4,
    rows=32,
    rows_of_rank=(8, 8),
    accumulation=2,
    documents=Range(32.0, 32.0, 32.0),
    hard_negatives=0.0,
    with_hard_negatives=0.0,
    twice=0.0,
    sitting_out=0.0,
    candidates=Range(30.0, 31.0, 32.0),
    wanted=None,
    short_of_wanted=0.0,
    left_out={},
    copies="exact",
    loss="sigmoid, temperature 0.2, bias -2",
    chance=3.4,
    floor=0.0,
    computed_with={"precision": "bf16"},
)
RECIPE = {
    "model": "base",
    "dataset": "set",
    "out": "run",
    "train": {
        "steps": 60,
        "batch": {"rows": 16, "ignore": "document"},
        "loss": {"kind": "info_nce", "temperature": 0.02},
        "optimiser": {"lr": 1e-4, "warmup_steps": 6},
    },
}


def facts(step=0, **changed):
    told = {"settled": asdict(SETTLED), "data": asdict(DATA), "model": asdict(MODEL)}
    return {"kind": "facts", "step": step} | told | {"sampled": "words"} | changed


def probe(step):
    return {"kind": "probe"} | asdict(PROBE) | {"step": step}


def step(number, **values):
    row = {"kind": "step", "step": number, "loss": 4.0, "chance": 4.85, "margin": 0.1, "lr": 1e-3}
    return row | {"rows_per_second": 900.0, "candidates": 31.0, "masked": 1.0} | values


WHOLE = [
    {"kind": "ledger", "step": 0} | asdict(LEDGER),
    facts(),
    probe(0),
    step(1),
    step(2, skipped=True, candidates=30.0),
    probe(2),
    {"kind": "diagnosis", "step": 2, "cause": "at_chance", "told": "why"},
    {"kind": "fault"} | asdict(FAULT),
]


@pytest.fixture
def write(tmp_path):
    """Writes a run folder."""

    def write(*rows, recipe=RECIPE, end="\n"):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        if rows:
            (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + end)
        if recipe is not None:
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return folder

    return write


def test_all_that_a_run_noted_is_read_as_it_was_measured(write):
    evidence = read_evidence(write(*WHOLE))
    assert (evidence.settled, evidence.data, evidence.model) == (SETTLED, DATA, MODEL)
    assert [each.step for each in evidence.probes] == [0, 2]
    assert evidence.probes[0] == PROBE
    assert evidence.fault == FAULT
    assert [each.step for each in evidence.steps] == [1, 2]
    assert (evidence.candidates, evidence.masked, evidence.skipped) == (30.5, 1.0, 0.5)


def test_checks_are_read_and_older_logs_have_none(write):
    checks = [Checked("positions", True, "right"), Checked("weights", False, "two", "fresh")]
    row = {"kind": "checks", "step": 0, "checks": [*map(asdict, checks), {"name": "odd"}]}
    assert read_evidence(write(row, *WHOLE)).checks == tuple(checks)
    assert read_evidence(write(*WHOLE)).checks == ()
    damaged = read_log(write({"kind": "checks", "step": 0}, *WHOLE) / "log.jsonl")
    assert (damaged.checks, damaged.num_unreadable) == ((), 1)


def test_what_the_run_was_told_is_in_the_log(write):
    log = read_log(write(*WHOLE) / "log.jsonl")
    assert [row["cause"] for row in log.diagnoses] == ["at_chance"]
    assert log.num_unreadable == 0


def test_a_log_that_ends_anywhere_is_read(write):
    folder = write(*WHOLE)
    whole = (folder / "log.jsonl").read_bytes()
    seen = set()
    for length in range(0, len(whole), 7):
        (folder / "log.jsonl").write_bytes(whole[:length])
        evidence = read_evidence(folder)
        seen.add((len(evidence.steps), len(evidence.probes), evidence.data is None))
        assert evidence.settled.loss in ("pairwise", "info_nce")
    assert seen == {(0, 0, True), (0, 0, False), (0, 1, False), (1, 1, False), (2, 1, False)} | {
        (2, 2, False)
    }


def test_a_run_that_died_before_its_first_line_has_its_recipe(write):
    settled = read_evidence(write()).settled
    assert settled == Settled("info_nce", 0.02, 1e-4, 60, 6, 16, 1, 1, None, "document")


def test_of_ranks_an_old_log_says_what_its_ledger_does(write):
    rows = [row for row in WHOLE if row["kind"] in ("ledger", "step")]
    settled = read_evidence(write(*rows)).settled
    assert (settled.ranks, settled.temperature, settled.rows) == (4, 0.02, 16)


@pytest.mark.parametrize("recipe", [None, {"train": {"steps": 3, "unknown": 1}}, [], "train"])
def test_without_a_recipe_the_ledger_says_what_was_asked_for(write, recipe):
    rows = [row for row in WHOLE if row["kind"] in ("ledger", "step")]
    settled = read_evidence(write(*rows, recipe=recipe)).settled
    assert settled == Settled("sigmoid", 0.2, 1e-3, 2, None, 32, 2, 4, "bf16")


def test_an_old_log_alone_is_evidence_too(write):
    evidence = read_evidence(write(step(1), step(2), recipe=None))
    assert (evidence.settled.loss, evidence.settled.steps) == ("info_nce", 2)
    assert (evidence.data, evidence.model, evidence.fault, evidence.probes) == (None,) * 3 + ((),)


def test_a_log_of_generation_is_known_by_its_steps(write):
    rows = [step(1, margin=None, candidates=None, masked=None, answer_tokens=30.0)]
    evidence = read_evidence(write(*rows, recipe=None))
    assert evidence.settled.loss == "generation"
    assert (evidence.candidates, evidence.masked) == (None, None)


def test_facts_of_a_generation_run_have_what_there_is(write):
    text = facts(settled=asdict(Settled("generation")), model={"trains": {"norm": 3}, "frozen": {}})
    del text["data"]
    evidence = read_evidence(write(text, step(1)))
    assert evidence.settled.loss == "generation"
    assert evidence.data is None
    assert (evidence.model.trains, evidence.model.positions) == ({"norm": 3}, None)


def test_where_weights_come_from_is_of_the_beginning(write):
    began = facts(model=asdict(MODEL) | {"is_trained": False})
    newer = {"is_trained": True, "positions": "right", "fresh": [], "drawn": []}
    later = facts(2, model=asdict(MODEL) | newer)
    model = read_evidence(write(began, step(1), step(2), later)).model
    assert (model.positions, model.is_trained) == ("right", False)
    assert (model.fresh, model.drawn) == (("a.b",), ("norm",))


@pytest.mark.parametrize(
    ("first", "later", "known"), [((), None, ()), (None, (), ()), ((), (), ())]
)
def test_a_load_that_was_not_compared_takes_nothing_back(write, first, later, known):
    rows = [
        facts(n, model=asdict(MODEL) | {"fresh": each}) for n, each in enumerate((first, later))
    ]
    assert read_evidence(write(rows[0], step(1), rows[1])).model.fresh == known


def test_lines_of_another_version_are_left_out_one_by_one(write):
    odd = [facts(data={"rows": 3}), {"kind": "probe", "step": 0, "loss": 1.0}, {"kind": "fault"}]
    evidence = read_evidence(write(*odd, probe(1)))
    assert (evidence.settled, evidence.data, evidence.fault) == (SETTLED, None, None)
    assert [each.step for each in evidence.probes] == [1]


def test_numbers_that_are_none_are_read(write):
    broken = probe(0) | {"loss": float("nan"), "query_rank": float("inf")}
    (found,) = read_evidence(write(broken)).probes
    assert found.loss != found.loss
    assert found.query_rank == float("inf")
    (found,) = read_evidence(write(probe(0) | {"loss": None})).probes
    assert found.loss != found.loss


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ColfolioError, match=r"neither log\.jsonl nor recipe\.yaml"):
        read_evidence(tmp_path)


def test_settings_say_what_was_asked_for():
    settings = TrainSettings.model_validate(RECIPE["train"] | {"precision": "fp16"})
    assert settled_of(settings, ranks=2) == Settled(
        "info_nce", 0.02, 1e-4, 60, 6, 16, 1, 2, "fp16", "document"
    )
    text = TrainSettings.model_validate({"steps": 3, "objective": "generation"})
    assert (settled_of(text).loss, settled_of(text).ignored) == ("generation", None)


def test_a_log_is_evidence_without_its_folder(write):
    log = read_log(write(*WHOLE) / "log.jsonl")
    assert evidence_of_log(log).settled == SETTLED
