"""Another trainer's log becomes evidence, and what it cannot tell is said, not guessed."""

import json
import math
from itertools import count

import pytest

from colfolio.diagnosis.causes import HEALTHY, diagnose
from colfolio.diagnosis.foreign_log import read_foreign_log
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
    return diagnose(log.evidence).first


def test_a_pairwise_loss_that_stands_at_0_69_has_collapsed(table):
    path = table([LN2 + noise(n, 3e-4) for n in range(300)])
    finding = first_of(read_foreign_log(path, "pairwise", 32))
    assert finding.cause == "collapsed"
    assert "0.6931" in finding.paragraph()


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
    assert "few_candidates" in {each.cause for each in diagnose(log.evidence).findings}
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
    [({"loss": math.nan}, "loss"), ({"loss": 0.0, "grad_norm": math.nan}, "gradient")],
)
def test_numbers_that_stay_no_numbers_are_a_fault_at_their_first_step(state, broken, what):
    history = logged([3.0] * 5, grad_norm=1.0) + [{"step": step, **broken} for step in (60, 70, 80)]
    log = read_foreign_log(state(history), "info_nce", 32)
    assert (log.evidence.fault.step + 1, log.evidence.fault.what) == (60, what)
    assert log.evidence.skipped == 0
    assert first_of(log).cause == "not_finite"


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
        ("step,loss\n1,2\nx,2\n", "line 3: expected a number as step, found 'x'"),
        ("step,loss\n1,2\n2,two\n", "line 3: expected a number as loss, found 'two'"),
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
)
def test_what_is_no_log_is_refused_with_file_line_and_what_was_expected(written, text, said):
    path = written(text)
    with pytest.raises(ColfolioError) as refused:
        read_foreign_log(path, "pairwise", 8)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xff\xfe\x00step")
    with pytest.raises(ColfolioError, match="no UTF-8 text"):
        read_foreign_log(path, "pairwise", 8)
