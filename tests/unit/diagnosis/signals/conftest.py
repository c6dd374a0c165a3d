import pytest

from colfolio.data.dataset import load_dataset
from colfolio.data.picks import BatchSettings, Picker
from colfolio.diagnosis.signals import Probe, draw_probe


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory, write_shapes):
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    write_shapes(folder, {"train": 40, "validation": 12})
    return folder


@pytest.fixture(scope="session")
def shapes(shapes_folder):
    return load_dataset(shapes_folder, "train")


@pytest.fixture(scope="session")
def held_out(shapes_folder):
    return load_dataset(shapes_folder, "validation")


@pytest.fixture
def make_picker(shapes):
    """The batches that a run of these settings draws."""

    def make(dataset=shapes, seed=0, **settings):
        return Picker(dataset, BatchSettings.model_validate({"rows": 6} | settings), seed)

    return make


@pytest.fixture
def make_batch(shapes, shared_retriever, make_picker):
    """The probe's rows of a data set."""

    def make(dataset=shapes, retriever=shared_retriever, **settings):
        batch = BatchSettings.model_validate({"rows": 6} | settings)
        relations = make_picker(dataset, **settings).relations
        return draw_probe(dataset, retriever.collator, batch, relations)

    return make


@pytest.fixture
def probe(make_batch):
    return Probe(make_batch())
