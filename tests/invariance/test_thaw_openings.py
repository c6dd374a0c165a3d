"""What the model computes goes on as a stage opens: no jump, no stale features, no lost moment."""

import copy

import pytest
import torch
from adapters import assert_close_to, exact_vectors, vectors_of

from colfolio.data.dataset import load_dataset
from colfolio.models.adapters import has_adapter
from colfolio.models.retriever import Retriever
from colfolio.training import TrainSettings, save_model, start_training, train
from colfolio.training.frozen_states import FrozenStates
from colfolio.training.graph_budget import GraphBudget
from colfolio.training.opening import open_due_stages

BASE = {
    "steps": 8,
    "seed": 3,
    "batch": {"rows": 6},
    "optimiser": {"lr": 1e-2, "warmup_steps": 2},
    "precision": "fp32",
    "threads": 1,
}
LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "projection": "full", "vision": ["attn.qkv"]}
BELOW = ["vision", "merger", "embedding", "layers", "norm"]


@pytest.fixture(scope="module")
def shapes(write_shapes, tmp_path_factory):
    """Two batches an epoch."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, {"train": 12})
    return load_dataset(folder, "train")


def state_of(retriever, **values):
    return start_training(retriever, TrainSettings.model_validate(BASE | values))


def train_until(state, shapes, step):
    reports = []
    for report in train(state, shapes):
        reports.append(report)
        if report.step == step:
            break
    return reports


@pytest.mark.parametrize("projection", ["full", "adapter", "frozen"])
@pytest.mark.parametrize("stage", [["layers[1]"], ["vision", "layers"], ["all"]])
def test_merging_adapters_as_their_layers_open_changes_no_vector(
    make_retriever, shapes, pages, texts, projection, stage
):
    stages = [{"open": stage, "step": 4, "lr": 1e-3}]
    state = state_of(make_retriever(), lora=LORA | {"projection": projection}, thaw=stages)
    train_until(state, shapes, 4)

    before, base = vectors_of(state.retriever, texts, pages), copy.deepcopy(state.model.weights())
    exact = exact_vectors(state.retriever, texts, pages)
    assert open_due_stages(state, 0.0)
    assert_close_to(vectors_of(state.retriever, texts, pages), before, exact)
    now = state.retriever.weights()
    assert any(not torch.equal(now[name], base[name]) for name in base)  # something was merged
    is_projection_left = projection == "adapter" and stage != ["all"]
    assert has_adapter(state.retriever) == (is_projection_left or stage == ["layers[1]"])


def test_the_loss_of_a_batch_is_the_same_right_before_and_after_adapters_are_merged(
    make_retriever, shapes
):
    def third_loss(thaw):
        state = state_of(make_retriever(), lora=LORA, thaw=thaw)
        return train_until(state, shapes, 4)[-1].loss

    stage = {"open": ["all"], "step": 3, "lr": 1e-3}
    assert third_loss([stage]) == pytest.approx(third_loss([]), abs=1e-6)


def test_what_was_open_keeps_its_moments_and_what_leaves_takes_its_own_along(
    make_retriever, shapes
):
    stages = [{"open": ["layers[1]"], "step": 3, "lr": 1e-3}]
    state = state_of(make_retriever(), lora=LORA, thaw=stages)
    train_until(state, shapes, 3)

    def moments():
        names = {id(weight): name for name, weight in state.model.named_parameters()}
        return {
            names[id(weight)]: copy.deepcopy(values)
            for weight, values in state.optimiser.state.items()
        }

    before = moments()
    open_due_stages(state, 0.0)
    after = moments()
    gone = {name for name in before if "layers.1" in name}
    assert gone
    assert after.keys() == before.keys() - gone
    for name, values in after.items():
        for key, value in values.items():
            assert torch.equal(value, before[name][key]), name
    trained = {name for group in state.groups for name in group.names}
    assert trained == {
        name for name, weight in state.model.named_parameters() if weight.requires_grad
    }
    in_groups = [weight for group in state.optimiser.param_groups for weight in group["params"]]
    assert len(in_groups) == len(trained)


OPEN_VISION = [
    {"open": ["vision[1]", "merger"], "step": 4, "lr": 1e-2},
    {"open": ["all"], "step": 6, "lr": 1e-2},
]


def losses(make_retriever, shapes, **values):
    state = state_of(make_retriever(), frozen=BELOW, thaw=OPEN_VISION, **values)
    return state, [(report.loss, report.gradient_norm) for report in train(state, shapes)]


def assert_close(mine, plain):
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(plain), rtol=1e-4, atol=0)


def test_features_are_kept_below_the_border_as_it_is_now(make_retriever, shapes):
    state = state_of(make_retriever(), frozen=BELOW, thaw=OPEN_VISION, features={"ram_mb": 20.0})
    cache, found = state.exact.cache, []
    for _ in train(state, shapes):
        found.append((cache.entries, cache.hits))
    # an epoch is two steps: what the first made, the second reads, until the border moves
    assert found[:4] == [(6, 0), (12, 0), (12, 6), (12, 12)]
    assert found[4:6] == [(6, 12), (12, 12)]
    assert found[6:] == [(0, 12), (0, 12)]
    _, mine = losses(make_retriever, shapes, features={"ram_mb": 20.0})
    assert_close(mine, losses(make_retriever, shapes)[1])


def test_a_border_that_stays_where_it_was_would_be_seen(make_retriever, shapes, monkeypatch):
    """The fault that the tests above are for: output of layers that train by now is used again."""
    begin = FrozenStates.begin
    first = []

    def stale(self):
        begin(self)
        first.append((self._borders, self._part))
        self._borders, self._part = first[0]

    _, plain = losses(make_retriever, shapes)
    monkeypatch.setattr(FrozenStates, "begin", stale)
    _, mine = losses(make_retriever, shapes, features={"ram_mb": 20.0})
    assert_close(mine[:4], plain[:4])
    assert mine[4] != pytest.approx(plain[4], rel=1e-3)


def test_graphs_stay_within_their_budget_as_more_of_the_model_opens(
    make_retriever, shapes, monkeypatch
):
    budget, count, kept = 2.0, GraphBudget.count, []

    def counted(self, side, tokens, held, *, is_kept):
        count(self, side, tokens, held, is_kept=is_kept)
        kept.append((self._kept + self._shared) / 2**20)

    monkeypatch.setattr(GraphBudget, "count", counted)
    memory = {"chunk_tokens": 1}
    _, mine = losses(make_retriever, shapes, memory=memory | {"activation_mb": budget})
    assert 0.5 * budget < max(kept) <= budget
    assert_close(mine, losses(make_retriever, shapes, memory=memory)[1])


def saved_by(state, folder, **values):
    save_model(state, folder, **values)
    return Retriever.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("projection", ["full", "adapter"])
def test_a_run_that_trained_adapters_alone_ends_with_an_adapter_of_its_base(
    make_retriever, shapes, pages, texts, tmp_path, projection, dtype
):
    make_retriever(dtype=dtype).save_pretrained(tmp_path / "base")
    base = Retriever.from_pretrained(tmp_path / "base", device="cpu")
    state = state_of(base, lora=LORA | {"projection": projection})
    train_until(state, shapes, 3)
    again = saved_by(state, tmp_path / "model", base=str(tmp_path / "base"))
    assert (tmp_path / "model" / "adapter_config.json").is_file()
    assert has_adapter(again)
    expected = vectors_of(state.retriever, texts, pages)
    found = vectors_of(again.to(torch.float32), texts, pages)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("stage", [["layers[1]"], ["all"]])
def test_a_run_that_opened_its_base_ends_with_a_whole_model(
    make_retriever, shapes, pages, texts, tmp_path, stage
):
    stages = [{"open": stage, "step": 3, "lr": 1e-3}]
    state = state_of(make_retriever(), lora=LORA, thaw=stages)
    train_until(state, shapes, 5)
    before = state.retriever.fingerprint()
    again = saved_by(state, tmp_path / "model", base="somewhere")
    assert not has_adapter(again)
    exact = exact_vectors(state.retriever, texts, pages)
    expected = vectors_of(state.retriever, texts, pages)
    assert_close_to(vectors_of(again, texts, pages), expected, exact)
    assert has_adapter(state.retriever) == (stage != ["all"])
    told = state.retriever.contract
    assert told.recipe is None
    assert state.retriever.fingerprint() == before
