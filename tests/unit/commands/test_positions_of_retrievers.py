"""Whose code will call a model decides whose positions are asked, not which files lie beside."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from colfolio.commands.export import export_command
from colfolio.commands.positions import positions_command
from colfolio.data.collate import Collator
from colfolio.models import Retriever
from colfolio.models.adapters import LoraSettings, add_lora, save_adapter

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
OURS = "a retriever, as it encodes documents"


@pytest.fixture
def base(make_retriever, tmp_path):
    make_retriever(dim=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def exported(base, tmp_path):
    """A folder for a library, with our contract beside."""

    def export(target, **options):
        export_command(str(base), target, tmp_path / target, **options)
        assert (tmp_path / target / "colfolio.json").is_file()
        return tmp_path / target

    return export


@pytest.fixture
def clip_file(tmp_path):
    """Two seconds of noise at two frames a second, of 4 x 2 tokens."""
    path = tmp_path / "clip.mp4"
    generator = np.random.default_rng(0)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 112, 56, "yuv420p"
        for _ in range(4):
            pixels = generator.integers(0, 256, (56, 112, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def ask(capsys, model, **options):
    capsys.readouterr()
    is_right = positions_command(str(model), **options)
    return is_right, capsys.readouterr().out


def test_an_export_to_transformers_is_asked_as_transformers_calls_it(exported, capsys):
    is_right, told = ask(capsys, exported("transformers"))
    assert not is_right
    assert "ColQwen2ForRetrieval of transformers" in told
    assert "flattened" in told


@pytest.mark.parametrize("target", ["colpali-engine", "sentence-transformers"])
def test_an_export_is_asked_as_its_library_calls_it(target, exported, capsys):
    is_right, told = ask(capsys, exported(target))
    assert is_right
    assert OURS not in told
    assert "Qwen2VLModel" in told


def test_an_export_to_colfolio_is_asked_as_colfolio_calls_it(exported, capsys):
    is_right, told = ask(capsys, exported("colfolio"))
    assert is_right
    assert OURS in told


def test_an_adapter_of_ours_is_asked_in_its_base(base, tmp_path, capsys):
    retriever = Retriever.from_pretrained(base)
    add_lora(retriever, LoraSettings(rank=2), 0)
    save_adapter(retriever, tmp_path / "adapter", str(base))
    is_right, told = ask(capsys, tmp_path / "adapter")
    assert is_right
    assert OURS in told


@pytest.mark.parametrize("family", FAMILIES)
def test_a_retriever_is_asked_as_it_encodes_clips(
    family, make_family_retriever, tmp_path, clip_file, capsys
):
    make_family_retriever(family).save_pretrained(tmp_path / "model")
    is_right, told = ask(capsys, tmp_path / "model", video=clip_file)
    assert is_right, told
    assert told.count("Positions are right in 1 row.") == 1
    assert "video" in told


def test_a_retriever_is_asked_with_an_image_in_its_own_grid(retriever, tmp_path, capsys):
    Image.new("RGB", (28, 28 * 12)).save(tmp_path / "tall.png")
    retriever.save_pretrained(tmp_path / "model")
    is_right, told = ask(capsys, tmp_path / "model", image=tmp_path / "tall.png")
    assert is_right
    assert "5      image    1   5   1    1   5   1" in told


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_positions_of_a_clip_are_found(
    family, make_family_retriever, tmp_path, clip_file, capsys, monkeypatch
):
    make_family_retriever(family).save_pretrained(tmp_path / "model")
    own = Collator.documents

    def flat(self, documents, behind=None):
        packed = own(self, documents, behind)
        packed.position_ids.copy_(torch.arange(len(packed.token_ids)).expand(3, -1))
        return packed

    monkeypatch.setattr(Collator, "documents", flat)
    is_right, told = ask(capsys, tmp_path / "model", video=clip_file)
    assert not is_right
    assert "differs" in told
