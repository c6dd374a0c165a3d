import shutil

import pytest
from exports import CONTRACT, TARGETS, found

from colfolio.models import base_from_shape
from colfolio.models.formats import write


@pytest.fixture(scope="session")
def exported(tmp_path_factory, tiny_shape, tiny_tokenizer):
    """A folder of each target, without our contract, and the retriever that is in all of them."""
    shape = tiny_shape.model_copy(update={"dim": 128})
    retriever = base_from_shape(shape, tiny_tokenizer, 0).eval()
    root = tmp_path_factory.mktemp("exported")
    for target in TARGETS:
        write(found(retriever), root / target, target)
        if target != "colfolio":
            (root / target / CONTRACT).unlink()
    return root, retriever


@pytest.fixture
def folder_of(exported, tmp_path):
    """A copy of the folder of a target, to be changed."""

    def copied(target):
        return shutil.copytree(exported[0] / target, tmp_path / "model")

    return copied
