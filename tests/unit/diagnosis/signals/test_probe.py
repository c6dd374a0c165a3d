"""The probe: its rows, its numbers, and that it leaves no trace."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from colfolio.batch import Packed
from colfolio.data.video import Clip
from colfolio.diagnosis.signals import Probe, draw_probe
from colfolio.diagnosis.signals import probe as probe_module
from colfolio.diagnosis.signals.probe_batch import num_rows, spread_runs
from colfolio.maxsim import maxsim
from colfolio.training import start_training, train
from colfolio.training.losses import LossSettings, contrastive_loss

LOSSES = [
    LossSettings(),
    LossSettings(temperature=0.05, symmetric=True),
    LossSettings(kind="pairwise"),
    LossSettings(kind="sigmoid", bias=-2.0),
]


_DRAWS_NOTHING = """
import random, sys
import numpy as np
import torch
from colfolio.data.dataset import load_dataset
from colfolio.data.picks import BatchSettings, Picker
from colfolio.diagnosis.signals import Probe, draw_probe, measure_data, measure_model
from colfolio.models import Retriever
from colfolio.training.losses import LossSettings

def states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

torch.set_num_threads(1)
retriever = Retriever.from_pretrained(sys.argv[1], device="cpu").train()
dataset, settings = load_dataset(sys.argv[2], "train"), BatchSettings(rows=6)
before = states()
picker = Picker(dataset, settings, 0)
batch = draw_probe(dataset, retriever.collator, settings, picker.relations)
probe = Probe(batch)
probe.measure(retriever, 0, LossSettings(), "bf16")
measure_data(dataset, retriever.collator, settings, picker, batch)
measure_model(retriever, probe, "fp32", read_again=retriever.weights)
assert states() == before
"""


def test_the_rows_lie_in_runs_of_neighbours_spread_over_the_data_set():
    for queries in (1000, 64, 33, 24, 16):
        places = spread_runs(queries, num_rows(queries, 20))
        assert places == sorted(set(places))
        assert places[0] >= 0
        assert places[-1] < queries
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        assert min(map(len, runs)) >= 4
    spread = spread_runs(1000, 32)
    assert [place // 250 for place in spread[::8]] == [0, 1, 2, 3]


def test_the_probe_is_the_same_whenever_it_is_drawn(make_batch):
    one, other = make_batch(), make_batch()
    assert one.texts == other.texts
    for name in ("queries", "documents"):
        mine, its = getattr(one, name), getattr(other, name)
        assert torch.equal(mine.token_ids, its.token_ids)
        assert torch.equal(mine.patches, its.patches)


def test_the_documents_are_the_answers_of_the_queries(make_batch, shapes):
    batch = make_batch()
    assert len(batch.queries) == len(batch.documents) == 20  # half of the split
    rows = torch.arange(20)
    assert batch.positives[rows, batch.answers].all()
    asked = [shapes.queries[int(number)].text for number in batch.order]
    assert list(batch.texts) == asked


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_loss_and_margin_are_those_of_training_on_the_same_rows(shared_retriever, probe, loss):
    signals = probe.measure(shared_retriever, 0, loss, "fp32")
    batch = probe.batch
    with torch.no_grad():
        sides = [shared_retriever(side) for side in (batch.queries, batch.documents)]
    summary = contrastive_loss(maxsim(*sides), batch.positives, batch.ignored, loss)
    for name in ("loss", "chance", "margin", "spread", "accuracy"):
        assert getattr(signals, name) == pytest.approx(float(getattr(summary, name)), rel=1e-5)
    assert signals.documents == 20
    assert signals.floor < signals.chance
    assert 1 <= signals.rank <= 20
    assert 1 <= signals.document_rank <= signals.dim == 16
    distances = signals.query_distance, signals.document_distance
    assert distances == pytest.approx((0, 0), abs=1e-9)
    assert signals.score_error < 1e-4


def test_chunks_change_no_number(shared_retriever, make_batch):
    whole, cut = Probe(make_batch()), Probe(make_batch(), chunk_tokens=20)
    first, second = (
        each.measure(shared_retriever, 3, LossSettings(), "fp32") for each in (whole, cut)
    )
    for name in ("loss", "margin", "spread", "query_rank", "document_cosine"):
        assert getattr(first, name) == pytest.approx(getattr(second, name), rel=1e-4)


def test_no_generator_is_touched(tmp_path, retriever, shapes_folder):
    # in a process of its own: beartype, which checks types here, draws from Python's generator
    retriever.save_pretrained(tmp_path / "base")
    script = [sys.executable, "-P", "-c", _DRAWS_NOTHING, tmp_path / "base", shapes_folder]
    done = subprocess.run(script, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def test_a_measurement_leaves_weights_modes_and_gradients_as_they_were(make_retriever, probe):
    retriever = make_retriever().train()
    retriever.backbone.visual.eval()
    retriever.projection.weight.grad = torch.ones_like(retriever.projection.weight)
    weights = retriever.fingerprint()
    modes = [module.training for module in retriever.modules()]
    opened = [parameter.requires_grad for parameter in retriever.parameters()]
    probe.measure(retriever, 0, LossSettings(), "bf16")
    assert retriever.fingerprint() == weights
    assert [module.training for module in retriever.modules()] == modes
    assert [parameter.requires_grad for parameter in retriever.parameters()] == opened
    assert torch.equal(retriever.projection.weight.grad, torch.ones(16, 32))


@pytest.mark.parametrize("lora", [None, {"rank": 2, "dropout": 0.5}], ids=["full", "lora"])
def test_measuring_between_the_steps_changes_no_weight(make_retriever, shapes, probe, lora):
    settings = _settings(lora=lora)
    fingerprints = []
    for is_measured in (False, True):
        state = start_training(make_retriever(), settings)
        for report in train(state, shapes):
            if is_measured:
                probe.measure(state.retriever, report.step, settings.loss, "fp32")
        fingerprints.append(state.retriever.fingerprint())
    assert fingerprints[0] == fingerprints[1]


def test_dropout_is_off(make_retriever, shapes, probe):
    state = start_training(make_retriever(), _settings(lora={"rank": 2, "dropout": 0.5}))
    for _ in train(state, shapes):
        pass
    one, other = (probe.measure(state.retriever, 0, LossSettings(), "fp32") for _ in range(2))
    assert one == other


def test_distances_are_from_the_first_measurement(make_retriever, probe):
    retriever = make_retriever()
    first = probe.measure(retriever, 0, LossSettings(), "fp32")
    with torch.no_grad():
        retriever.projection.weight.neg_()
        retriever.projection.bias.neg_()
    later = probe.measure(retriever, 9, LossSettings(), "fp32")
    assert first.query_distance == pytest.approx(0, abs=1e-6)
    assert later.query_distance == pytest.approx(2, abs=1e-5)
    assert later.document_distance == pytest.approx(2, abs=1e-5)
    assert later.loss == pytest.approx(first.loss, rel=1e-4)  # cosines are the same


def test_without_a_beginning_there_is_no_distance(shared_retriever, probe):
    signals = probe.measure(shared_retriever, 9, LossSettings(), "fp32")
    assert np.isnan([signals.query_distance, signals.document_distance]).all()


def test_scores_of_half_precision_are_seen(shared_retriever, probe, monkeypatch):
    monkeypatch.setattr(probe_module, "maxsim", lambda *sides: maxsim(*sides).bfloat16().float())
    signals = probe.measure(shared_retriever, 0, LossSettings(), "fp32")
    assert signals.score_error > 0.01
    assert signals.distinct_scores < 0.5


def test_a_model_of_no_numbers_is_measured_all_the_same(make_retriever, probe):
    retriever = make_retriever()
    with torch.no_grad():
        retriever.projection.weight.fill_(float("nan"))
    signals = probe.measure(retriever, 0, LossSettings(), "fp32")
    assert np.isnan([signals.loss, signals.margin, signals.query_rank]).all()
    assert (signals.accuracy, signals.rank) == (0, 20)


def test_a_collapsed_model_has_rank_one_and_a_cosine_of_one(make_retriever, probe):
    retriever = make_retriever()
    with torch.no_grad():
        retriever.projection.weight.zero_()
        retriever.projection.bias.fill_(1.0)
    signals = probe.measure(retriever, 0, LossSettings(), "fp32")
    assert signals.document_cosine == pytest.approx(1, abs=1e-6)
    assert signals.document_rank == pytest.approx(1, abs=1e-3)
    assert signals.spread < 1e-5
    assert signals.loss == pytest.approx(signals.chance, abs=1e-4)


def test_clips_are_measured_like_pages(shared_retriever, probe):
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (20, 4, 56, 56, 3), dtype=np.uint8)
    documents = shared_retriever.collator.documents([Clip(each, 0.5) for each in frames])
    assert isinstance(documents, Packed)
    of_clips = Probe(replace(probe.batch, documents=documents))
    signals = of_clips.measure(shared_retriever, 0, LossSettings(), "fp32")
    assert 0 < signals.loss < 10 * signals.chance


def test_a_split_in_which_nothing_can_be_compared_has_no_probe(
    tmp_path, make_picker, shared_retriever, encode_png, random_image
):
    from colfolio.data.dataset import CorpusRow, Query, load_dataset, write_split
    from colfolio.data.picks import BatchSettings

    rows = [CorpusRow(f"c{n}", encode_png(random_image(28, 28, n)), "one", 0) for n in range(6)]
    queries = [Query(f"q{n}", f"text {n}") for n in range(6)]
    write_split(tmp_path, "train", rows, queries, {f"q{n}": {f"c{n}": 1} for n in range(6)})
    dataset = load_dataset(tmp_path, "train")
    relations = make_picker(dataset).relations
    found = draw_probe(dataset, shared_retriever.collator, BatchSettings(), relations)
    assert found is None


def _settings(**values):
    from colfolio.training import TrainSettings

    return TrainSettings.model_validate(
        {
            "steps": 3,
            "batch": {"rows": 6},
            "optimiser": {"lr": 1e-2, "warmup_steps": 1},
            "precision": "fp32",
        }
        | values
    )
