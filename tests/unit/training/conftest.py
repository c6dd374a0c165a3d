import pytest

from colfolio.data.dataset import load_dataset
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
