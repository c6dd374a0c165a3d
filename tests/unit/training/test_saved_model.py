"""What a run saves as an adapter names the base as it is found elsewhere."""

import json

import pytest
import torch

from colfolio.errors import ColfolioError
from colfolio.models import LoraSettings, Retriever, hub
from colfolio.models.adapters import has_adapter
from colfolio.training import load_checkpoint, save_checkpoint, save_model, start_training, train

COMMIT = "0123456789" * 4


@pytest.fixture
def adapting(settings):
    return settings.model_copy(update={"steps": 1, "lora": LoraSettings(rank=2)})


def test_an_adapter_of_a_base_that_was_opened_in_another_dtype_opens(
    retriever, adapting, shapes, tmp_path
):
    retriever.save_pretrained(tmp_path / "base")
    half = Retriever.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    state = start_training(half, adapting)
    list(train(state, shapes))
    save_model(state, tmp_path / "model", base=str(tmp_path / "base"))
    opened = Retriever.from_pretrained(tmp_path / "model")
    assert opened.contract.base_hash == retriever.contract.base_hash


def test_a_base_whose_file_is_not_known_is_refused_before_the_first_step(retriever, adapting):
    with pytest.raises(ColfolioError, match="were cast since they were read"):
        start_training(retriever.to(torch.bfloat16), adapting)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_an_adapter_names_the_commit_of_its_base_on_the_hub_whatever_that_came_from(
    is_resumed, retriever, adapting, tmp_path, monkeypatch
):
    source = {"name": "published/backbone", "revision": "f" * 40}
    contract = retriever.contract.model_dump() | {"source": source}
    retriever.contract = type(retriever.contract).model_validate(contract)
    stored = tmp_path / "snapshots" / COMMIT
    retriever.save_pretrained(stored)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(stored))
    state = start_training(Retriever.from_pretrained("owner/base"), adapting)
    if is_resumed:
        path = save_checkpoint(state, tmp_path / "checkpoints", "data", keep=1)
        state = load_checkpoint(path, adapting, "data")
    save_model(state, tmp_path / "model", base="owner/base")
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", COMMIT)
    assert Retriever.from_pretrained(tmp_path / "model").contract.source.name == source["name"]


def test_a_run_on_an_adapter_ends_with_a_whole_model(retriever, adapting, shapes, tmp_path):
    retriever.save_pretrained(tmp_path / "base")
    first = start_training(retriever, adapting)
    list(train(first, shapes))
    save_model(first, tmp_path / "adapter", base="../base")
    plain = adapting.model_copy(update={"lora": None})
    state = start_training(Retriever.from_pretrained(tmp_path / "adapter"), plain)
    list(train(state, shapes))
    expected = state.retriever.encode_queries(["red circle"]).vectors
    save_model(state, tmp_path / "model", base=str(tmp_path / "adapter"))
    opened = Retriever.from_pretrained(tmp_path / "model")
    assert not has_adapter(opened)
    found = opened.encode_queries(["red circle"]).vectors
    assert (found - expected).abs().max() < 1e-6
