"""Another trainer's log becomes evidence, and what it cannot tell is said, not guessed."""

import json
import math
from itertools import count

import pytest

from colfolio.diagnosis.causes import HEALTHY, UNKNOWN
from colfolio.diagnosis.foreign.diagnosis import diagnose_log
from colfolio.diagnosis.foreign.log import read_foreign_log
from colfolio.errors import ColfolioError

LN2 = math.log(2)


def noise(number, size):
    return size * math.sin(1.7 * number)


@pytest.fixture
def written(tmp_path):
    numbers = count()

    def write(text, suffix=".csv"):
        path = tmp_path / f"log-{next(numbers)}{suffix}"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def table(written):
    return lambda losses: written(
        "step,loss\n" + "".join(f"{n},{loss}\n" for n, loss in enumerate(losses, start=1))
    )


@pytest.fixture
def state(written):
    def write(history, **others):
        return written(json.dumps({"log_history": history, "global_step": 9} | others), ".json")

    return write


def logged(losses, every=10, **others):
    return [{"step": every * n, "loss": loss} | others for n, loss in enumerate(losses, start=1)]


def first_of(log):
    return diagnose_log(log).first


def causes_of(log):
    return [finding.cause for finding in diagnose_log(log).findings]


def test_a_pairwise_loss_that_stands_at_0_69_has_collapsed(table):
    path = table([LN2 + noise(n, 3e-4) for n in range(300)])
    finding = first_of(read_foreign_log(path, "pairwise", 32))
    assert finding.cause == "collapsed"
    assert "0.6931" in finding.paragraph()
    assert "Whether scores ever differed the log does not say" in finding.paragraph()


def test_a_loss_that_moved_and_then_stands_at_chance_has_collapsed_for_sure(table):
    path = table([LN2 + 0.5 * math.exp(-n / 9) + noise(n, 1e-4) for n in range(300)])
    finding = first_of(read_foreign_log(path, "pairwise", 32))
    assert finding.title.startswith("the model has collapsed")
    assert "does not say" not in finding.paragraph()


@pytest.mark.parametrize("size", [0.001, 0.004, 0.02, 0.04])
@pytest.mark.parametrize("batch", [3, 4, 64])
def test_a_pairwise_loss_about_ln_2_is_named_however_much_it_wobbles(state, size, batch):
    path = state(logged([LN2 + noise(n, size) for n in range(50)]))
    found = diagnose_log(read_foreign_log(path, "pairwise", batch))
    assert [finding.cause for finding in found.findings] in (["collapsed"], ["pairwise_loss"])
    told = found.first.paragraph()
    assert "The pairwise loss is least hurt" in told
    assert "InfoNCE" in told
    assert "Go on" not in told
    assert "train." not in told
    assert not set(causes_of(read_foreign_log(path, "pairwise", batch))) & {
        each.cause for each in found.ruled_out
    }


@pytest.mark.parametrize("size", [0.0, 0.001, 0.004, 0.02, 0.04])
@pytest.mark.parametrize(("loss", "batch"), [("info_nce", 32), ("info_nce", 4), ("sigmoid", 4)])
def test_a_loss_that_never_fell_is_not_healthy(state, size, loss, batch):
    path = state(logged([LN2 + noise(n, size) for n in range(50)]))
    found = diagnose_log(read_foreign_log(path, loss, batch))
    assert found.first.cause != HEALTHY
    assert "not_started" not in {each.cause for each in found.ruled_out}
    assert all(not finding.change for finding in found.findings)


def test_a_loss_that_stands_between_chance_and_its_floor_is_unknown_and_says_what_it_is_near(state):
    path = state(logged([LN2 + noise(n, 0.04) for n in range(50)]))
    finding = first_of(read_foreign_log(path, "info_nce", 32))
    assert finding.cause == UNKNOWN
    assert "0.693 is ln 2, which is chance among 2" in finding.paragraph()


def test_a_rate_of_nothing_is_named_and_not_a_collapse(written):
    rows = "".join(f"{n},{math.log(32) + noise(n, 1e-4)},1e-9\n" for n in range(1, 301))
    log = read_foreign_log(written(f"step,loss,learning_rate\n{rows}"), "info_nce", 32)
    assert causes_of(log) == ["rate_too_low"]


def test_a_sigmoid_loss_at_ln_2_a_pair_is_of_logits_that_are_0(table):
    finding = first_of(
        read_foreign_log(table([LN2 + noise(n, 1e-4) for n in range(60)]), "sigmoid", 4)
    )
    assert "logits that are all 0" in finding.paragraph()


@pytest.mark.parametrize("size", [0.002, 0.004, 0.02, 0.04])
def test_a_sigmoid_loss_above_chance_at_ln_2_a_pair_is_not_told_to_take_more_rows(table, size):
    for pairs in (1, 4):
        path = table([pairs * (LN2 + noise(n, size)) for n in range(60)])
        found = diagnose_log(read_foreign_log(path, "sigmoid", 4)).findings
        assert found[0].cause in ("collapsed", "not_started")
        assert "few_candidates" not in [finding.cause for finding in found]
        assert "ln 2 a pair" in found[0].paragraph()
    low = table([1.02 * 0.5623 + noise(n, size) for n in range(60)])
    assert "few_candidates" in causes_of(read_foreign_log(low, "sigmoid", 4))


def test_info_nce_that_stands_at_ln_n_has_collapsed(table):
    path = table([math.log(32) + noise(n, 1e-3) for n in range(300)])
    assert first_of(read_foreign_log(path, "info_nce", 32, 0.02)).cause == "collapsed"
    moving = table([math.log(32) + noise(n, 0.1) for n in range(300)])
    assert first_of(read_foreign_log(moving, "info_nce", 32, 0.02)).cause == "not_started"


def test_a_pairwise_loss_that_stands_at_0_3133_with_temperature_1_is_at_its_floor(table):
    for losses in ([0.3133] * 60, [0.3133 + 0.38 * math.exp(-n / 30) for n in range(300)]):
        log = read_foreign_log(table(losses), "pairwise", 32, 1.0)
        assert first_of(log).cause == "temperature_floor"
        assert "such scores are assumed" in " ".join(log.notes)
    without = read_foreign_log(table([0.3133] * 60), "pairwise", 32)
    assert without.evidence.steps[-1].floor is None
    assert "give --temperature 1" in " ".join(without.notes)


def test_a_loss_below_the_floor_of_normalised_scores_shows_that_they_are_sums(table):
    log = read_foreign_log(
        table([0.1 + 0.59 * math.exp(-n / 30) for n in range(300)]), "pairwise", 32, 1.0
    )
    assert log.evidence.steps[-1].floor == 0
    assert log.notes == ()
    assert first_of(log).cause == HEALTHY


def test_a_loss_between_says_what_it_is_with_either_kind_of_scores(table):
    path = table([0.5 + 0.19 * math.exp(-n / 30) for n in range(300)])
    (note,) = read_foreign_log(path, "pairwise", 32, 1.0).notes
    assert "0.313" in note
    assert "51%" in note
    assert "28%" in note


def test_a_loss_that_falls_is_healthy(table):
    losses = [0.3 + 3 * math.exp(-n / 60) + noise(n, 0.05) for n in range(300)]
    assert first_of(read_foreign_log(table(losses), "info_nce", 32, 0.02)).cause == HEALTHY


@pytest.mark.parametrize(
    ("loss", "batch", "chance"),
    [("pairwise", 8, LN2), ("pairwise", 512, LN2), ("info_nce", 8, math.log(8))],
)
def test_chance_is_that_of_loss_and_batch(table, loss, batch, chance):
    log = read_foreign_log(table([0.4, 0.3, 0.2]), loss, batch)
    assert log.evidence.steps[0].chance == pytest.approx(chance)
    assert log.evidence.candidates == batch


def test_the_sigmoids_chance_is_its_entropy_as_a_mean_or_a_sum(table):
    entropy = -(math.log(1 / 32) + 31 * math.log(31 / 32)) / 32
    for begin, expected in ((0.7, entropy), (25.0, 32 * entropy)):
        log = read_foreign_log(table([begin, 0.1, 0.05]), "sigmoid", 32)
        assert log.evidence.steps[0].chance == pytest.approx(expected)
        assert f"{entropy:.4f}" in log.notes[0]


def test_a_loss_at_the_chance_of_fewer_candidates_tells_how_many_there_are(table):
    log = read_foreign_log(table([math.log(4)] * 200), "info_nce", 64)
    assert log.evidence.candidates == 4
    assert "compared with 4 documents, not 64" in log.notes[0]
    assert "few_candidates" in {each.cause for each in diagnose_log(log).findings}
    many = read_foreign_log(table([math.log(256)] * 200), "info_nce", 2**40)
    assert many.evidence.candidates == 256
    moving = read_foreign_log(
        table([math.log(4) + noise(n, 0.1) for n in range(200)]), "info_nce", 64
    )
    assert moving.evidence.candidates == 64


def test_sums_over_accumulated_batches_are_divided(table):
    log = read_foreign_log(table([4 * LN2 + noise(n, 1e-3) for n in range(200)]), "pairwise", 8)
    assert log.evidence.steps[-1].loss == pytest.approx(LN2, abs=1e-3)
    assert "4 accumulated batches" in log.notes[0]
    assert first_of(log).cause == "collapsed"


def test_a_trainer_state_gives_steps_rates_evaluations_and_its_length(state):
    history = [
        *logged([3.0, 2.0], learning_rate=1e-4, grad_norm=2.5),
        {"step": 20, "eval_loss": 1.5},
    ]
    log = read_foreign_log(
        state([*history, {"step": 20, "train_runtime": 1.0}], max_steps=500, train_batch_size=4),
        "info_nce",
        32,
    )
    assert [(step.step, step.loss, step.lr) for step in log.evidence.steps] == [
        (10, 3.0, 1e-4),
        (20, 2.0, 1e-4),
    ]
    assert [(each.step, each.values["loss"]) for each in log.evidence.evaluations] == [(20, 1.5)]
    assert log.evidence.settled.steps == 500
    assert log.evidence.settled.lr == 1e-4
    assert "4 rows at a time, not 32" in log.notes[0]


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ({"loss": math.nan}, "loss"),
        ({"loss": None}, "loss"),
        ({"loss": "N/A"}, "loss"),
        ({"loss": 0.0}, "loss"),
        ({"loss": 0.0, "grad_norm": math.nan}, "loss"),
        ({"loss": 0.5, "grad_norm": math.nan}, "gradient"),
    ],
)
def test_numbers_that_stay_no_numbers_are_a_fault_at_their_first_step(state, broken, what):
    history = logged([3.0] * 5, grad_norm=1.0) + [{"step": step, **broken} for step in (60, 70, 80)]
    log = read_foreign_log(state(history), "info_nce", 32)
    assert (log.evidence.fault.step + 1, log.evidence.fault.what) == (60, what)
    assert log.evidence.skipped == 0
    assert first_of(log).cause == "not_finite"


def test_a_loss_that_is_0_because_it_fell_there_is_no_fault(table):
    log = read_foreign_log(
        table([3 * math.exp(-n / 9) for n in range(90)] + [0.0] * 10), "info_nce", 8
    )
    assert log.evidence.fault is None
    assert first_of(log).cause == HEALTHY
    zeros = read_foreign_log(table([0.0] * 60), "info_nce", 8)
    assert first_of(zeros).cause == "not_finite"
    assert "exactly 0 in every row" in zeros.notes[0]


def test_rows_without_a_loss_are_passed_over_where_others_follow(state):
    history = logged([3.0 - 0.1 * n for n in range(20)])
    history[4]["loss"], history[5]["loss"] = None, "None"
    log = read_foreign_log(state([*history, {"step": 210, "loss": None}]), "info_nce", 8)
    assert len(log.evidence.steps) == 18
    assert (log.evidence.fault, log.evidence.skipped) == (None, 0)


def test_a_query_without_another_document_has_nothing_to_learn(table):
    for loss in ("pairwise", "info_nce", "sigmoid"):
        with pytest.raises(ColfolioError, match="its own document alone"):
            read_foreign_log(table([3.5, 3.4]), loss, 1)
    assert "few_candidates" in causes_of(read_foreign_log(table([0.0] * 20), "info_nce", 1))


def test_epochs_that_count_steps_from_1_are_numbered_through(written):
    losses = [3 * math.exp(-n / 60) for n in range(250)]
    rows = "".join(f"{n % 100 + 1},{loss}\n" for n, loss in enumerate(losses))
    log = read_foreign_log(written("step,loss\n" + rows), "info_nce", 32)
    assert [step.step for step in log.evidence.steps] == list(range(1, 251))
    assert [step.loss for step in log.evidence.steps] == losses
    assert "numbered through, to 250" in log.notes[0]


def test_rows_that_a_later_one_replaces_are_counted(written):
    rows = "".join(f"{n},{3 - n / 10}\n" for n in [*range(1, 20), *range(12, 22)])
    log = read_foreign_log(written("step,loss\n" + rows), "info_nce", 32)
    assert [step.step for step in log.evidence.steps] == list(range(1, 22))
    assert "8 rows" in log.notes[0]


def test_a_gradient_that_overflows_and_comes_back_was_a_skipped_step(state):
    history = logged([3.0 - 0.1 * n for n in range(10)], grad_norm=1.0)
    history[3]["grad_norm"] = math.inf
    log = read_foreign_log(state(history), "info_nce", 32)
    assert log.evidence.fault is None
    assert log.evidence.skipped == pytest.approx(0.1)


@pytest.mark.parametrize(
    "text",
    [
        "step,loss\n1,3.5\n2,3.25\n",
        "\ufeffStep\tLoss\n1\t3.5\n2\t3.25\n",
        'Step;"train/loss"\n1;3,5\n2;3,25\n',
        "Wall time,Step,Value\n17.5,1,3.5\n18.5,2,3.25\n",
        '"Step","sky - train/loss","sky - train/loss__MIN"\n"1","3.5","3"\n"2","3.25","3"\n',
        "_step,train/loss,eval/loss\n1,3.5,\n2,,1.0\n2,3.25,\n",
        "loss,val_loss,STEP\n3.0,9,2\n3.5,9,1\n3.25,9,2.0\n",
        "epoch,step,train_loss_step,train_loss_epoch\n0,1,3.5,\n0,2,3.25,\n",
        "step,loss,grad_norm\n1,3.5,tensor(1.25)\n2,3.25,None\n",
    ],
)
def test_tables_are_read_however_they_name_and_divide_their_columns(written, text):
    steps = read_foreign_log(written(text), "pairwise", 8).evidence.steps
    assert [(step.step, step.loss) for step in steps] == [(1, 3.5), (2, 3.25)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: expected columns named step and loss"),
        ("step,accuracy\n1,2\n", "found 'step', 'accuracy'"),
        ("step,loss\n", "holds no loss of any step"),
        ("step,loss\n1,2\nx,2\n", "line 3: expected a whole number as step, found 'x'"),
        ("step,loss\n1,2\n2,two\n", "line 3: expected a number as loss, found 'two'"),
        ("step,loss\n1,-0.5\n", "line 2: loss is -0.5, and neither pairwise nor infonce"),
        ('step,loss\n1,"' + "x" * 200_000 + '"\n', "line 2: expected a table of step and loss"),
        ("[" * 200_000, "line 1: expected a table of step and loss"),
        ('{"log_history":' + "[" * 100_000 + "]" * 100_000 + "}", "expected the JSON"),
        (
            '{"log_history": [{"step": 1, "loss": 1' + "0" * 400 + "}]}",
            "entry 1 of log_history: expected a number as loss, found 100",
        ),
        ('step,loss\n1,"0.5\n' + "2,3.0\n" * 900, "line 2: expected a number as loss, found '0.5"),
        ("step,loss\n1.5,2\n", "line 2: expected a whole number as step"),
        ("Step,a - train/loss,b - train/loss\n1,2,3\n", "'a - train/loss', 'b - train/loss' may"),
        ('{"log_history": [', "expected the JSON of a trainer_state.json"),
        ('{"epoch": 1}', "found the keys epoch"),
        ('{"log_history": [{"loss": 1.0}]}', "entry 1 of log_history: expected a whole number"),
        (
            '{"log_history": [{"loss": "a", "step": 1}]}',
            "entry 1 of log_history: expected a number",
        ),
    ],
    ids=lambda value: value[:40],
)
def test_what_is_no_log_is_refused_with_file_line_and_what_was_expected(written, text, said):
    path = written(text)
    with pytest.raises(ColfolioError) as refused:
        read_foreign_log(path, "pairwise", 8)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < len(str(path)) + 250
    assert said in str(refused.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xff\xfe\x00step")
    with pytest.raises(ColfolioError, match="no UTF-8 text"):
        read_foreign_log(path, "pairwise", 8)
