import shutil

import pytest
import torch

from colfolio.errors import CheckpointError
from colfolio.models import Retriever, formats, outline
from colfolio.models.adapters import LoraSettings, add_lora, save_adapter
from colfolio.models.checkpoint import cast_parameters, save_parts
from colfolio.models.families import FAMILIES
from colfolio.models.hub import Location
from colfolio.models.outline import outline_of


def described(retriever):
    return {
        name: (weight.dtype, weight.shape, weight.requires_grad)
        for name, weight in retriever.named_parameters()
    }


def assert_outline(path):
    found, loaded = outline_of(path), Retriever.from_pretrained(path, device="cpu")
    assert all(weight.is_meta for weight in found.retriever.parameters())
    assert described(found.retriever) == described(loaded)
    assert found.retriever.contract.deciding() == loaded.contract.deciding()
    assert found.has_dtypes


def write_foreign(retriever, folder, target):
    found = formats.Found(
        "colfolio",
        retriever.backbone.config,
        retriever.weights(),
        retriever.tokenizer,
        retriever.contract,
    )
    formats.write(found, folder, target)


@pytest.fixture
def base(make_retriever, tmp_path):
    """A base in bf16 with a projection in float32."""
    retriever = make_retriever(dtype="bfloat16")
    cast_parameters(retriever.projection, torch.float32)
    retriever.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    retriever = Retriever.from_pretrained(base, device="cpu")
    settings = LoraSettings(rank=2, vision=("attn.qkv",), projection="full")
    add_lora(retriever, settings, seed=1)
    save_adapter(retriever, tmp_path / "adapter", "../base")
    return tmp_path / "adapter"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_is_the_model_but_for_its_numbers(make_family_retriever, tmp_path, family):
    make_family_retriever(family).save_pretrained(tmp_path / "base")
    assert_outline(tmp_path / "base")


def test_an_outline_has_the_dtypes_of_the_files(base):
    assert_outline(base)
    dtypes = {weight.dtype for weight in outline_of(base).retriever.parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}


def test_an_outline_of_an_adapter_is_its_base_with_it(adapter):
    assert_outline(adapter)


@pytest.mark.filterwarnings("ignore::colfolio.models.formats.AssumedWarning")
@pytest.mark.parametrize("has_contract", [True, False])
def test_an_outline_of_another_librarys_folder_is_the_model(
    shared_retriever, tmp_path, has_contract
):
    for target in ("transformers", "sentence-transformers"):
        folder = tmp_path / target
        write_foreign(shared_retriever, folder, target)
        if not has_contract:
            (folder / "colfolio.json").unlink()
        assert_outline(folder)


def test_weights_that_are_not_there_are_not_missed(adapter, base):
    (base / "model.safetensors").unlink()
    for path in (base, adapter):
        found = outline_of(path)
        assert not found.has_dtypes
        assert all(weight.is_meta for weight in found.retriever.parameters())


def test_no_weight_of_a_base_is_read(base, adapter, monkeypatch):
    def refuse(path, *_):
        raise AssertionError(path)

    monkeypatch.setattr("colfolio.models.formats.reading.read_weights", refuse)
    for path in (base, adapter):
        assert outline_of(path).has_dtypes


def test_a_file_cut_within_its_head_is_refused(base):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        outline_of(base)


def test_an_adapter_without_a_base_is_refused(adapter, base):
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=r"\.\./base: no such folder"):
        outline_of(adapter)


def test_of_the_hub_nothing_large_is_fetched_for_an_outline(base, monkeypatch):
    """A folder as the hub's cache has it when JSON alone was fetched."""
    (base / "model.safetensors").unlink()
    asked = []

    def locate(path_or_id, revision=None, *, with_weights=True):
        asked.append(with_weights)
        return Location(base, "owner/name", "0" * 40)

    monkeypatch.setattr(outline, "locate", locate)
    assert not outline_of("owner/name").has_dtypes
    (base / "colfolio.json").unlink()
    with pytest.raises(CheckpointError, match=r"hf download owner/name` and give its folder"):
        outline_of("owner/name")
    assert asked == [False, False]


def test_a_contract_that_its_backbone_cannot_keep_is_refused(make_retriever, tmp_path):
    retriever = make_retriever()
    other = retriever.contract.model_copy(update={"position_scheme": "qwen3_vl"})
    config, tokenizer = retriever.backbone.config, retriever.tokenizer
    save_parts(tmp_path / "base", retriever.weights(), config, tokenizer, other)
    with pytest.raises(CheckpointError, match="does not fit its backbone: position_scheme"):
        outline_of(tmp_path / "base")
