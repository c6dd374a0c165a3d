import pytest
from adapters import SMALL, change_open_weights

from colfolio.models import Retriever
from colfolio.models.adapters import (
    add_lora,
    save_adapter,
)


@pytest.fixture
def base(tmp_path, shared_retriever):
    shared_retriever.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapted(base):
    """A base with an adapter that has been trained, and another projection."""

    def make(settings=SMALL):
        retriever = Retriever.from_pretrained(base)
        add_lora(retriever, settings, seed=1)
        change_open_weights(retriever)
        return retriever

    return make


@pytest.fixture
def saved(tmp_path, adapted):
    save_adapter(adapted(), tmp_path / "adapter", "../base")
    return tmp_path / "adapter"
