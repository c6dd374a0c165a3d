import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conversing import DIRECTIONS, QUESTION, generator_of, moving_square, write_moving
from torch import nn

from colfolio.batch import UNLABELLED
from colfolio.data.conversations import load_conversations
from colfolio.data.dataset import load_dataset
from colfolio.data.video import Clip
from colfolio.errors import DatasetError, RecipeError
from colfolio.models.generator import Generator
from colfolio.training import (
    GenerationReport,
    TrainSettings,
    load_checkpoint,
    save_checkpoint,
    start_training,
    train,
)
from colfolio.training.dropout import RowDropouts
from colfolio.training.exact_batch import MemorySettings
from colfolio.training.feature_cache import FeatureCacheSettings
from colfolio.training.generation import ExactText
from colfolio.training.text_objective import text_metrics

WHOLE = MemorySettings()


@pytest.fixture(scope="session")
def moving_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    write_moving(folder, "train", 48, seed=1)
    write_moving(folder, "validation", 12, seed=2)
    return folder


@pytest.fixture(scope="session")
def moving(moving_folder):
    return load_conversations(moving_folder, "train")


@pytest.fixture
def make_generator(tiny_shape_of):
    def make(family="colfolio_grafted", **values):
        return generator_of(tiny_shape_of(family), **values)

    return make


@pytest.fixture
def settings():
    """Six steps over two epochs and a half."""
    return TrainSettings.model_validate(
        {
            "objective": "generation",
            "steps": 6,
            "seed": 3,
            "batch": {"rows": 20},
            "optimiser": {"lr": 1e-2, "warmup_steps": 2},
            "precision": "fp32",
        }
    )


@pytest.fixture
def trained(make_generator, moving):
    def trained(settings, **values):
        state = start_training(make_generator(**values), settings)
        return state, list(train(state, moving))

    return trained


def conversations(generator, random_image, rows=6):
    """Answers of different lengths about images of several sizes and clips."""
    sizes = [(28, 28), (56, 84), (84, 56)]
    visuals = [random_image(*sizes[row % 3], seed=row) for row in range(rows)]
    frames = np.stack([random_image(28, 56, seed) for seed in range(4)])
    visuals[rows // 2] = Clip(frames, 0.5)
    answers = ["left " * (1 + row * row % 5) for row in range(rows)]
    return generator.chat.conversations(visuals, [QUESTION] * rows, answers, range(rows))


def gradients(generator, batches, memory=WHOLE, **values):
    generator.zero_grad()
    exact = ExactText(generator, memory, **values)
    summary = exact.backward(batches, list(range(len(batches))))
    named = generator.named_parameters()
    return summary, {name: w.grad.clone() for name, w in named if w.grad is not None}


def assert_same(found, expected, bound=1e-12):
    summary, mine = found
    plain, theirs = expected
    assert summary.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    assert summary.accuracy == plain.accuracy
    assert mine.keys() == theirs.keys()
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).norm() <= bound * total, name


@pytest.mark.parametrize("tied", [False, True])
def test_packed_equals_one_by_one_whatever_the_chunk(make_generator, random_image, tied):
    generator = make_generator(tied=tied).to(torch.float64)
    batch = conversations(generator, random_image)
    generator.zero_grad()
    losses = []
    for row in range(len(batch)):
        alone = batch.rows(row, row + 1)
        places = (alone.labels != UNLABELLED).nonzero().flatten()
        logits = generator(alone.inputs, torch.arange(len(alone.labels)))[places]
        losses.append(F.cross_entropy(logits, alone.labels[places], reduction="none"))
    loss = torch.cat(losses).mean()  # of tokens, not of rows
    loss.backward()
    plain = {name: w.grad.clone() for name, w in generator.named_parameters()}
    for chunk_tokens in (None, 1, 60):
        memory = MemorySettings(chunk_tokens=chunk_tokens)
        summary, found = gradients(generator, [batch], memory)
        assert summary.loss.item() == pytest.approx(loss.item(), rel=1e-12)
        total = torch.stack([gradient.norm() for gradient in plain.values()]).norm()
        assert found.keys() == plain.keys()
        for name, gradient in plain.items():
            assert (found[name] - gradient).norm() <= 1e-12 * total, name


def test_accumulated_batches_weigh_by_their_tokens_as_one_batch_of_all(
    make_generator, random_image
):
    generator = make_generator().to(torch.float64)
    whole = conversations(generator, random_image)
    parts = [whole.rows(0, 1), whole.rows(1, 4), whole.rows(4, 6)]
    assert len({part.num_labels / len(part) for part in parts}) == 3
    assert_same(gradients(generator, parts), gradients(generator, [whole]))


def test_chance_is_the_logarithm_of_the_vocabulary_and_counts_are_of_tokens(
    make_generator, random_image
):
    generator = make_generator()
    batch = conversations(generator, random_image)
    with torch.no_grad():
        generator.projection.weight.zero_()
    summary, _ = gradients(generator, [batch], MemorySettings(chunk_tokens=40))
    assert summary.chance.item() == pytest.approx(math.log(generator.vocabulary))
    assert summary.loss.item() == pytest.approx(summary.chance.item())
    assert summary.accuracy.item() == 0  # equal logits are no prediction
    assert summary.answer_tokens.item() == batch.num_labels
    assert summary.tokens.item() == len(batch.labels)


def test_logits_are_made_of_answer_tokens_alone(make_generator, random_image):
    generator = make_generator()
    batch = conversations(generator, random_image)
    seen = []
    generator.projection.register_forward_hook(lambda _m, _i, logits: seen.append(len(logits)))
    gradients(generator, [batch])
    assert seen == [batch.num_labels]
    assert batch.num_labels < len(batch.labels) / 3


def test_dropout_draws_by_row_whatever_the_chunk(make_generator, random_image):
    generator = make_generator().to(torch.float64).train()
    for layer in generator.backbone.language_model.layers:
        layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(0.4))
    dropouts = RowDropouts(generator)
    batch = conversations(generator, random_image)
    plain = gradients(generator, [batch], dropouts=dropouts)
    chunked = gradients(generator, [batch], MemorySettings(chunk_tokens=50), dropouts=dropouts)
    assert_same(chunked, plain)
    dropouts.restore()
    generator.eval()
    assert gradients(generator, [batch])[0].loss != plain[0].loss


def test_a_chunk_above_the_budget_is_refused(make_generator, random_image):
    generator = make_generator()
    batch = conversations(generator, random_image)
    with pytest.raises(RecipeError, match=r"tokens of conversations holds .*activation_mb is 0.01"):
        gradients(generator, [batch], MemorySettings(activation_mb=0.01))
    gradients(generator, [batch], MemorySettings(activation_mb=50.0))


def test_each_step_reports_itself(trained, settings, moving):
    state, reports = trained(settings)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert (state.position.epoch, state.position.index) == (2, 2)
    for report in reports:
        assert isinstance(report, GenerationReport)
        assert report.chance == pytest.approx(math.log(state.generator.vocabulary), rel=1e-6)
        assert report.gradient_norm > 0
        assert report.answer_tokens >= 40
        assert report.rows_per_second == pytest.approx(20 / report.seconds)
        assert report.tokens_per_second == pytest.approx(report.tokens / report.seconds)
        assert {"vision", "embedding", "layers"} <= report.parts.keys()


def test_a_step_is_the_same_in_chunks_and_in_several_batches(trained, settings):
    _, plain = trained(settings)
    half = settings.batch.model_copy(update={"rows": 10})
    changes = [
        {"memory": MemorySettings(chunk_tokens=70)},
        {"batch": half, "accumulation": 2},
        {"gradient_checkpointing": "all"},
    ]
    for change in changes:
        _, reports = trained(settings.model_copy(update=change))
        # batches of ten take other places of an epoch from its third on
        for mine, expected in zip(reports[:2], plain[:2], strict=True):
            assert mine.loss == pytest.approx(expected.loss, rel=1e-4), change
            assert mine.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-3), change
            assert mine.answer_tokens == expected.answer_tokens


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_run_ends_on_the_bits_of_the_unbroken_one(
    trained, make_generator, settings, moving, tmp_path, tied
):
    unbroken, reports = trained(settings, tied=tied)
    state = start_training(make_generator(tied=tied), settings)
    steps = train(state, moving)
    first = [next(steps) for _ in range(3)]
    path = save_checkpoint(state, tmp_path, moving.fingerprint, 1)
    steps.close()
    again = load_checkpoint(path, settings, moving.fingerprint, "cpu")
    assert isinstance(again.model, Generator)
    losses = [report.loss for report in [*first, *train(again, moving)]]
    assert losses == [report.loss for report in reports]
    assert again.model.fingerprint() == unbroken.model.fingerprint()


def test_frozen_features_are_kept_across_epochs_and_change_nothing(
    make_generator, settings, moving
):
    losses = []
    for ram_mb in (0.0, 10.0):
        generator = make_generator()
        generator.backbone.visual.requires_grad_(False)
        features = FeatureCacheSettings(ram_mb=ram_mb)
        state = start_training(generator, settings.model_copy(update={"features": features}))
        losses.append([report.loss for report in train(state, moving)])
    assert state.exact.cache.hits > 24
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_held_out_loss_is_a_mean_over_all_its_tokens(trained, settings, moving_folder):
    state, _ = trained(settings)
    held_out = load_conversations(moving_folder, "validation")
    found = text_metrics(state, held_out)
    state.settings = settings.model_copy(
        update={"batch": settings.batch.model_copy(update={"rows": 5})}
    )
    assert text_metrics(state, held_out) == pytest.approx(found, rel=1e-5)
    assert state.model.training
    assert found["loss"] < math.log(state.generator.vocabulary)


def test_bf16_autocast_keeps_weights_in_float32(trained, settings):
    state, reports = trained(settings.model_copy(update={"precision": "bf16"}))
    _, exact = trained(settings)
    assert {weight.dtype for weight in state.model.parameters()} == {torch.float32}
    assert reports[0].loss == pytest.approx(exact[0].loss, rel=0.05)
    assert reports[-1].loss != exact[-1].loss


def test_it_learns_where_a_square_goes(make_generator, settings, tmp_path):
    write_moving(tmp_path, "train", 192, seed=1)
    write_moving(tmp_path, "validation", 48, seed=2)
    learning = settings.model_copy(
        update={
            "steps": 60,
            "batch": settings.batch.model_copy(update={"rows": 32}),
            "optimiser": settings.optimiser.model_copy(update={"lr": 4e-3}),
        }
    )
    state = start_training(make_generator(tied=True), learning)
    reports = list(train(state, load_conversations(tmp_path, "train")))
    assert reports[0].accuracy < 0.1
    assert reports[0].loss > 0.9 * reports[0].chance
    found = text_metrics(state, load_conversations(tmp_path, "validation"))
    assert found["token_accuracy"] > 0.9
    assert found["loss"] < math.log(3) / 2  # of a guess among the three, and a sure end
    generator = np.random.default_rng(9)
    rights = [
        state.generator.generate(Clip(moving_square(where, generator), 0.5), QUESTION, 8) == where
        for where in list(DIRECTIONS) * 4
    ]
    assert sum(rights) >= 9


@pytest.mark.parametrize(
    "values", [{"loss": {"kind": "pairwise"}}, {"batch": {"rows": 4, "hard_negatives": 2}}]
)
def test_settings_of_retrieval_are_refused(values):
    with pytest.raises(ValueError, match="which are of retrieval"):
        TrainSettings.model_validate({"objective": "generation", "steps": 1} | values)


def test_a_model_of_the_other_objective_is_refused(retriever, make_generator, settings):
    with pytest.raises(RecipeError, match="trains a Generator, received a Retriever"):
        start_training(retriever, settings)
    other = settings.model_copy(update={"objective": "retrieval"})
    with pytest.raises(RecipeError, match="trains a Retriever, received a Generator"):
        start_training(make_generator(), other)


def test_a_batch_of_more_rows_than_conversations_is_refused(make_generator, settings, moving):
    batch = settings.batch.model_copy(update={"rows": 49})
    state = start_training(make_generator(), settings.model_copy(update={"batch": batch}))
    with pytest.raises(DatasetError, match=r"batch\.rows is 49.*48"):
        train(state, moving)


def test_a_dataset_of_the_other_kind_is_refused(shapes_folder, moving_folder):
    with pytest.raises(DatasetError, match=r"dataset for retrieval.*set train\.objective"):
        load_conversations(shapes_folder, "train")
    with pytest.raises(DatasetError, match=r"holds conversations.*set train\.objective"):
        load_dataset(moving_folder, "train")
