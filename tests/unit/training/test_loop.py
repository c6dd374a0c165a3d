import math
from itertools import islice

import pytest
import torch

from colfolio.data.contrastive import BatchSource
from colfolio.data.dataset import load_dataset
from colfolio.errors import DatasetError, RecipeError
from colfolio.training import loop, retrieval_objective, start_training, train
from colfolio.training.exact_batch import MemorySettings
from colfolio.training.feature_cache import FeatureCacheSettings
from colfolio.training.losses import LossSettings


def test_each_step_reports_itself(trained, settings):
    state, reports = trained(settings)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert state.step == 6
    assert (state.position.epoch, state.position.index) == (1, 2)
    for report in reports:
        assert report.chance == pytest.approx(math.log(report.candidates), rel=1e-5)
        assert report.candidates == 6
        assert report.rows_per_second == pytest.approx(6 / report.seconds)
        assert 0 <= report.accuracy <= 1
        assert report.gradient_norm > 0
    assert [report.lr for report in reports[:3]] == pytest.approx([5e-3, 1e-2, 1e-2])


def test_the_same_seed_trains_to_the_same_bits(trained, settings):
    first, again = trained(settings)[0], trained(settings)[0]
    assert first.retriever.fingerprint() == again.retriever.fingerprint()


def test_weights_that_train_are_float32_whatever_their_file_holds(make_retriever, settings):
    state = start_training(make_retriever(dtype="bfloat16"), settings)
    assert {weight.dtype for weight in state.retriever.parameters()} == {torch.float32}


def test_another_seed_of_the_data_trains_otherwise(trained, settings):
    other = settings.model_copy(update={"seed": 4})
    assert trained(settings)[0].retriever.fingerprint() != (
        trained(other)[0].retriever.fingerprint()
    )


def test_the_global_generator_does_not_decide_what_dropout_drops(trained, settings, with_dropout):
    with_dropout()
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state, _ = trained(settings)
        weights.append(state.retriever.fingerprint())
    assert weights[0] == weights[1]


def test_dropout_differs_from_step_to_step(
    retriever, make_retriever, settings, shapes, monkeypatch, with_dropout
):
    # only dropout can change the loss
    monkeypatch.setattr(loop, "learning_rates", lambda made, *_: [0.0] * len(made.param_groups))
    monkeypatch.setattr(retrieval_objective, "BatchSource", OneBatch)
    with_dropout()
    dropping = make_retriever()
    losses = [report.loss for report in train(start_training(dropping, settings), shapes)]
    assert len(set(losses)) == len(losses)
    plain = [report.loss for report in train(start_training(retriever, settings), shapes)]
    assert len(set(plain)) == 1


class OneBatch(BatchSource):
    def batches(self, position):
        drawn = next(super().batches(position))
        while True:
            yield drawn


def test_training_lowers_the_loss(trained, settings):
    _, reports = trained(settings.model_copy(update={"steps": 24}))
    assert sum(r.loss for r in reports[-5:]) < 0.8 * sum(r.loss for r in reports[:5])


def test_every_parameter_moves(trained, make_retriever, settings):
    state, _ = trained(settings)
    before = dict(make_retriever().named_parameters())
    for name, parameter in state.retriever.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_consumer_may_stop_at_any_step(make_retriever, shapes, settings):
    state = start_training(make_retriever(), settings)
    for _ in train(state, shapes):
        if state.step == 2:
            break
    assert state.step == 2
    assert [report.step for report in train(state, shapes)] == [3, 4, 5, 6]


def test_a_state_at_its_last_step_trains_no_further(trained, settings, shapes):
    state, _ = trained(settings)
    weights = state.retriever.fingerprint()
    assert list(train(state, shapes)) == []
    assert state.retriever.fingerprint() == weights


def test_an_evaluation_between_two_steps_changes_nothing(trained, make_retriever, shapes, settings):
    straight, _ = trained(settings)
    state = start_training(make_retriever(), settings)
    for _ in train(state, shapes):
        state.retriever.encode_queries(["red circle"])
        state.retriever.encode_documents([shapes.corpus.image(0)])
        torch.rand(3)
    assert state.retriever.fingerprint() == straight.retriever.fingerprint()


def test_more_rows_than_queries_are_refused(make_retriever, shapes, settings):
    batch = settings.batch.model_copy(update={"rows": 25})
    state = start_training(make_retriever(), settings.model_copy(update={"batch": batch}))
    with pytest.raises(DatasetError, match=r"a batch has 25 queries.*only 24"):
        next(train(state, shapes))


def test_an_image_that_cannot_be_read_stops_training_with_its_reason(
    make_retriever, settings, tmp_path
):
    lines = ["query,image", *(f"query {n},{n}.png" for n in range(6))]
    (tmp_path / "set.csv").write_text("\n".join(lines) + "\n")
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    dataset = load_dataset(tmp_path / "set.csv", "train")
    with pytest.raises(ValueError, match=r"\d\.png"):
        next(train(start_training(make_retriever(), settings), dataset))


def test_a_loss_that_is_no_number_stops_training(make_retriever, shapes, settings):
    retriever = make_retriever()
    with torch.no_grad():
        retriever.projection.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        next(train(start_training(retriever, settings), shapes))


def test_a_batch_in_which_every_query_sits_out_is_refused(
    make_retriever, settings, tmp_path, encode_png, random_image
):
    from colfolio.data.dataset import CorpusRow, Query, write_split

    rows = [CorpusRow(f"c{n}", encode_png(random_image(28, 28, n)), "one", 0) for n in range(6)]
    queries = [Query(f"q{n}", f"text {n}") for n in range(6)]
    write_split(tmp_path, "train", rows, queries, {f"q{n}": {f"c{n}": 1} for n in range(6)})
    state = start_training(make_retriever(), settings)
    with pytest.raises(DatasetError, match="every query sits out"):
        next(train(state, load_dataset(tmp_path, "train")))


def test_bf16_autocast_keeps_weights_and_vectors_in_float32(trained, settings):
    state, reports = trained(settings.model_copy(update={"precision": "bf16"}))
    plain, exact = trained(settings)
    assert {weight.dtype for weight in state.retriever.parameters()} == {torch.float32}
    assert reports[0].loss == pytest.approx(exact[0].loss, rel=0.05)
    assert state.retriever.fingerprint() != plain.retriever.fingerprint()


def test_threads_are_set_as_told(make_retriever, shapes, settings):
    before = torch.get_num_threads()
    try:
        state = start_training(make_retriever(), settings.model_copy(update={"threads": 2}))
        next(iter(train(state, shapes)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_batches_are_made_one_ahead_and_no_further(monkeypatch):
    made = []

    def batches():
        for number in range(100):
            made.append(number)
            yield number

    ahead = loop._ahead(batches(), 5)
    assert list(islice(ahead, 3)) == [0, 1, 2]
    ahead.close()
    assert len(made) <= 4
    assert list(loop._ahead(batches(), 0)) == []


def test_distillation_follows_what_a_teacher_scored(retriever, shapes_folder, settings):
    """The teacher prefers pages by their number, which no query asks for."""
    shapes = load_dataset(shapes_folder, "train")
    ids = shapes.corpus.ids
    shapes.teacher = {
        query.id: {name: float(ids.index(name) % 5) for name in ids} for query in shapes.queries
    }
    teaching = LossSettings(kind="distillation", temperature=2.0)
    changed = settings.model_copy(update={"loss": teaching, "steps": 24})
    reports = list(train(start_training(retriever, changed), shapes))
    first, last = reports[:5], reports[-5:]
    assert sum(r.loss for r in last) < 0.8 * sum(r.loss for r in first)
    assert all(report.candidates > 2 for report in reports)


def test_distillation_without_a_teacher_is_refused_before_the_first_step(
    retriever, shapes, settings
):
    changed = settings.model_copy(update={"loss": LossSettings(kind="distillation")})
    with pytest.raises(DatasetError, match="teacher"):
        train(start_training(retriever, changed), shapes)


@pytest.mark.parametrize(
    "changed",
    [
        {"accumulation": 2},
        {"memory": MemorySettings(chunk_tokens=50, activation_mb=8.0)},
        {"attention": "eager"},
        {"gradient_checkpointing": 2},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_a_step_costs_never_changes_what_it_does(trained, settings, changed):
    """But for accumulation, which makes one step of two batches."""
    _, plain = trained(settings)
    _, reports = trained(settings.model_copy(update=changed))
    if "accumulation" in changed:
        assert reports[0].loss != plain[0].loss
        return
    for mine, expected in zip(reports[:3], plain[:3], strict=True):
        assert mine.loss == pytest.approx(expected.loss, rel=1e-3)
        assert mine.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-3)


def test_a_cache_for_what_frozen_layers_make_is_refused_where_none_is_frozen(retriever, settings):
    changed = settings.model_copy(update={"features": FeatureCacheSettings(ram_mb=10.0)})
    with pytest.raises(RecipeError, match=r"10 MiB.*frozen"):
        start_training(retriever, changed)


def test_frozen_features_are_kept_across_epochs_and_change_nothing(
    make_retriever, settings, shapes
):
    reports = []
    for ram_mb in (0.0, 10.0):
        retriever = make_retriever()
        retriever.backbone.visual.requires_grad_(False)
        features = FeatureCacheSettings(ram_mb=ram_mb)
        changed = settings.model_copy(update={"features": features, "steps": 12})
        state = start_training(retriever, changed)
        reports.append([(r.loss, r.gradient_norm) for r in train(state, shapes)])
    assert state.exact.cache.hits > 24
    for mine, expected in zip(*reports, strict=True):
        assert mine == pytest.approx(expected, rel=1e-3)
