"""Trained adapters, merged and reopened, saved and loaded: the vectors stay to a millionth."""

import pytest
import torch
from adapters import as_foreign, change_config, vectors_of

from colfolio.data.dataset import load_dataset
from colfolio.models import Retriever
from colfolio.models.adapters import has_adapter, load_adapter, merge, unmerge
from colfolio.models.formats import AssumedWarning
from colfolio.training import (
    TrainSettings,
    load_checkpoint,
    save_checkpoint,
    save_model,
    start_training,
    train,
)

DATA = "a fingerprint"
USUAL = {"initializer_range": 0.02}  # weights of the size that published models begin with
BASE = {
    "steps": 3,
    "seed": 3,
    "batch": {"rows": 6},
    "optimiser": {"lr": 2e-2, "warmup_steps": 0},
    "precision": "fp32",
    "threads": 1,
}
SOME = ("layers.1.self_attn.q_proj", "layers.1.mlp.down_proj")
PLACES = {
    "text": {},
    "one layer of the text": {"text": SOME},
    "vision beside text": {"vision": ("attn.qkv", "mlp.fc1", "merger.mlp.0")},
    "vision alone": {"text": (), "vision": ("blocks.0.attn.qkv", "attn.proj")},
}
PROJECTIONS = ["full", "adapter", "frozen"]


@pytest.fixture(scope="module")
def shapes(write_shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, {"train": 12})
    return load_dataset(folder, "train")


@pytest.fixture
def trained(make_retriever, shapes, tmp_path, texts, pages):
    """The state after three steps with adapters, on a base that lies in `tmp_path/base`."""

    def make(**values):
        make_retriever(text=USUAL, vision=USUAL).save_pretrained(tmp_path / "base")
        base = Retriever.from_pretrained(tmp_path / "base", device="cpu")
        before = vectors_of(base, texts, pages)
        lora = {"rank": 3, "alpha": 6.0, "dropout": 0.1} | values
        state = start_training(base, TrainSettings.model_validate(BASE | {"lora": lora}))
        list(train(state, shapes))
        sides = [w for name, w in state.model.named_parameters() if ".lora_B." in name]
        assert sides
        assert all(side.any() for side in sides)
        assert (vectors_of(state.retriever, texts, pages) - before).abs().max() > 1e-3
        return state

    return make


def assert_within_a_millionth(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def assert_merged_alike(retriever, folder, expected, texts, pages):
    """Merged so that it can be undone, undone, merged for good, saved and loaded."""
    assert torch.equal(vectors_of(retriever, texts, pages), expected)
    merge(retriever, keeps_adapter=True)
    merged = vectors_of(retriever, texts, pages)
    assert_within_a_millionth(merged, expected)
    unmerge(retriever)
    assert torch.equal(vectors_of(retriever, texts, pages), expected)
    merge(retriever)
    assert not has_adapter(retriever)
    assert torch.equal(vectors_of(retriever, texts, pages), merged)
    retriever.save_pretrained(folder)
    again = Retriever.from_pretrained(folder, device="cpu")
    assert torch.equal(vectors_of(again, texts, pages), merged)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("place", PLACES)
def test_a_trained_adapter_saved_loaded_merged_saved_and_loaded_gives_the_same_vectors(
    place, projection, trained, tmp_path, texts, pages
):
    state = trained(**PLACES[place], projection=projection)
    expected = vectors_of(state.retriever, texts, pages)
    save_model(state, tmp_path / "adapter", base="../base")
    opened = Retriever.from_pretrained(tmp_path / "adapter", device="cpu")
    assert has_adapter(opened)
    assert_merged_alike(opened, tmp_path / "merged", expected, texts, pages)
    put_in = Retriever.from_pretrained(tmp_path / "base", device="cpu")
    load_adapter(put_in, tmp_path / "adapter")
    assert torch.equal(vectors_of(put_in, texts, pages), expected)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_of_a_trained_adapter_keeps_it_apart_and_its_model_has_it_merged(
    place, projection, trained, tmp_path, texts, pages
):
    state = trained(**PLACES[place], projection=projection)
    expected = vectors_of(state.retriever, texts, pages)
    path = save_checkpoint(state, tmp_path / "checkpoints", DATA, keep=1)
    resumed = load_checkpoint(path, state.settings, DATA, "cpu")
    save_model(resumed, tmp_path / "whole")  # of no base: the adapters are merged into it
    whole = Retriever.from_pretrained(tmp_path / "whole", device="cpu")
    assert not has_adapter(whole)
    assert_within_a_millionth(vectors_of(whole, texts, pages), expected)
    save_model(resumed, tmp_path / "adapter", base="../base")
    opened = Retriever.from_pretrained(tmp_path / "adapter", device="cpu")
    assert torch.equal(vectors_of(opened, texts, pages), expected)
    assert_merged_alike(resumed.retriever, tmp_path / "merged", expected, texts, pages)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_trained_adapter_scaled_by_the_root_of_its_rank_is_merged_alike(
    projection, trained, tmp_path, texts, pages
):
    state = trained(projection=projection)
    plain = vectors_of(state.retriever, texts, pages)
    save_model(state, tmp_path / "adapter", base="../base")
    as_foreign(tmp_path / "adapter")  # of its own Colfolio writes none, but opens and keeps them
    change_config(tmp_path / "adapter", use_rslora=True)
    with pytest.warns(AssumedWarning):
        opened = Retriever.from_pretrained(tmp_path / "adapter", device="cpu")
    expected = vectors_of(opened, texts, pages)
    assert (expected - plain).abs().max() > 1e-3
    assert_merged_alike(opened, tmp_path / "merged", expected, texts, pages)
