import pytest
from torch import nn

from colfolio.data.dataset import load_dataset
from colfolio.models.retriever import Retriever
from colfolio.training import TrainSettings, start_training, train


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory, write_shapes):
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    write_shapes(folder, {"train": 24, "validation": 12})
    return folder


@pytest.fixture(scope="session")
def shapes(shapes_folder):
    return load_dataset(shapes_folder, "train")


@pytest.fixture
def settings():
    """Six steps over two epochs, each step visibly large."""
    return TrainSettings.model_validate(
        {
            "steps": 6,
            "seed": 3,
            "batch": {"rows": 6},
            "optimiser": {"lr": 1e-2, "warmup_steps": 2},
            "precision": "fp32",
        }
    )


@pytest.fixture
def trained(make_retriever, shapes):
    """Trains a fresh tiny retriever and gives its state and reports."""

    def trained(settings, **shape):
        state = start_training(make_retriever(**shape), settings)
        return state, list(train(state, shapes))

    return trained


@pytest.fixture
def with_dropout(monkeypatch):
    """Every retriever that is built from now on drops in each feed-forward of its text tower."""
    build = Retriever.__init__

    def build_dropping(self, *parts):
        build(self, *parts)
        for layer in self.backbone.language_model.layers:
            layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(0.4))

    def switch_on():
        monkeypatch.setattr(Retriever, "__init__", build_dropping)

    return switch_on
