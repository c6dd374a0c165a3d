import json
from typing import get_args

import pytest
import torch

from colfolio import cli
from colfolio.commands import export
from colfolio.errors import CheckpointError
from colfolio.models import Retriever, formats
from colfolio.models.adapters import LoraSettings, add_lora, save_adapter
from colfolio.models.formats import AssumedWarning, detect
from colfolio.models.formats.reading import ADAPTER_FILE
from colfolio.models.hub import Location

TARGETS = ["colfolio", "colpali-engine", "transformers", "sentence-transformers"]


@pytest.fixture
def wide(make_retriever, tmp_path):
    """A base with as many dimensions as colpali-engine has."""
    make_retriever(dim=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapted(wide, tmp_path):
    """An adapter that is no longer zero, beside its base, and the retriever of both."""
    retriever = Retriever.from_pretrained(wide)
    add_lora(retriever, LoraSettings(rank=2), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in retriever.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
    save_adapter(retriever, tmp_path / "adapter", "../base")
    return tmp_path / "adapter", retriever


@pytest.fixture
def pushed(monkeypatch):
    """What was pushed, in place of pushing it."""
    calls = []

    def record(folder, repo_id, *, private=False):
        calls.append((folder, repo_id, private))
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(export, "push", record)
    monkeypatch.setattr(export, "check_push", lambda *_, **__: None)
    return calls


def test_the_command_line_offers_what_can_be_written():
    assert list(get_args(cli.Target)) == list(formats.TARGETS) == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_is_exported_and_comes_back(target, wide, tmp_path, colfolio):
    code, out, errors = colfolio("export", wide, "--to", target, "--out", tmp_path / "out")
    assert (code, errors) == (0, "")
    assert f"MB for {target}" in out
    assert detect(tmp_path / "out") == target
    back, retriever = Retriever.from_pretrained(tmp_path / "out"), Retriever.from_pretrained(wide)
    assert back.fingerprint() == retriever.fingerprint()


def test_what_a_user_of_the_library_must_know_is_on_the_screen(wide, tmp_path, colfolio):
    _, out, _ = colfolio("export", wide, "--to", "transformers", "--out", tmp_path / "out")
    assert "note: the forward of transformers' ColQwen2ForRetrieval" in out
    assert "position_ids" in out


def test_what_was_assumed_of_a_foreign_model_is_on_the_screen(wide, tmp_path, colfolio):
    colfolio("export", wide, "--to", "colpali-engine", "--out", tmp_path / "engine")
    (tmp_path / "engine" / "colfolio.json").unlink()
    code, out, errors = colfolio(
        "export", tmp_path / "engine", "--to", "colfolio", "--out", tmp_path / "own"
    )
    assert (code, errors) == (0, "")
    assert "note: the files say no query string" in out
    assumed = Retriever.from_pretrained(tmp_path / "own").contract.assumed
    assert len(assumed) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_a_merged_model_gives_the_vectors_of_its_adapter(
    target, adapted, wide, tmp_path, colfolio, texts, pages
):
    adapter, retriever = adapted
    plain = Retriever.from_pretrained(wide).encode_documents(pages).vectors
    assert (retriever.encode_documents(pages).vectors - plain).abs().max() > 1e-2
    arguments = ("--to", target, "--out", tmp_path / "out", "--merge")
    assert colfolio("export", adapter, *arguments)[0] == 0
    back = Retriever.from_pretrained(tmp_path / "out")
    for mine, theirs in (
        (retriever.encode_queries(texts), back.encode_queries(texts)),
        (retriever.encode_documents(pages), back.encode_documents(pages)),
    ):
        torch.testing.assert_close(mine.vectors, theirs.vectors, rtol=0, atol=1e-5)
    names = (tmp_path / "out").rglob("*")
    assert not [path for path in names if "adapter" in path.name]


@pytest.mark.parametrize("target", ["colfolio", "colpali-engine"])
def test_an_adapter_is_exported_alone_and_finds_its_base(target, adapted, tmp_path, colfolio):
    adapter, retriever = adapted
    out = tmp_path / "elsewhere" / "out"
    assert colfolio("export", adapter, "--to", target, "--out", out, "--adapter")[0] == 0
    assert not list(out.glob("model*"))
    assert Retriever.from_pretrained(out).fingerprint() == retriever.fingerprint()
    base = json.loads((out / ADAPTER_FILE).read_text())["base_model_name_or_path"]
    assert f"its base is {base}" in (out / "README.md").read_text()
    assert (out / "preprocessor_config.json").is_file() == (target == "colpali-engine")


def test_a_model_is_pushed_when_it_is_asked_for(wide, tmp_path, colfolio, pushed):
    out = tmp_path / "out"
    arguments = ("--to", "sentence-transformers", "--out", out)
    colfolio("export", wide, *arguments, "--push", "owner/name", "--private")
    assert pushed == [(out, "owner/name", True)]
    assert (out / "modules.json").is_file()


def test_nothing_is_pushed_unasked(wide, tmp_path, colfolio, pushed):
    colfolio("export", wide, "--to", "colfolio", "--out", tmp_path / "out")
    assert pushed == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "colfolio", "--adapter"), "has no adapter"),
        (("--to", "colfolio", "--merge"), "has no adapter"),
        (("--to", "colfolio", "--merge", "--adapter"), "give one"),
        (("--to", "transformers", "--adapter"), "give --merge"),
        (("--to", "colfolio", "--private"), "with --push"),
        (("--to", "colfolio", "--push", "name"), "owner/name"),
        (("--to", "colfolio", "--push", "me/"), "not a hub id"),
        (("--to", "colfolio", "--base", "other"), "which has no base"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, words, wide, tmp_path, refused):
    assert words in refused("export", wide, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_its_base_is_never_exported_by_a_guess(adapted, tmp_path, refused):
    errors = refused("export", adapted[0], "--to", "colfolio", "--out", tmp_path / "out")
    assert "--adapter" in errors
    assert "--merge" in errors


@pytest.mark.parametrize("name", ["../base", "base", "{base}"])
def test_an_adapter_on_a_base_that_nobody_has_is_not_pushed(
    name, adapted, wide, tmp_path, refused, pushed, monkeypatch
):
    # beside the adapter, in the folder that one stands in, or anywhere on this machine
    monkeypatch.chdir(tmp_path)
    save_adapter(adapted[1], tmp_path / "adapter", name.format(base=wide))
    arguments = ("--to", "colfolio", "--out", tmp_path / "out", "--adapter", "--push", "a/b")
    assert "nobody else has" in refused("export", tmp_path / "adapter", *arguments)
    assert pushed == []
    assert not (tmp_path / "out").exists()


def test_an_adapter_names_the_folder_that_was_opened(
    adapted, wide, tmp_path, colfolio, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_adapter(adapted[1], tmp_path / "adapter", "base")  # from here, not from the adapter
    arguments = ("--to", "colfolio", "--out", "out", "--adapter")
    assert colfolio("export", "adapter", *arguments)[0] == 0
    monkeypatch.chdir("/")
    back = Retriever.from_pretrained(tmp_path / "out")
    assert back.fingerprint() == adapted[1].fingerprint()


def test_an_adapter_on_a_base_of_the_hub_is_pushed_with_its_commit(
    adapted, wide, tmp_path, colfolio, pushed, monkeypatch
):
    commit = "0123456789" * 4

    def base_of(adapter, given=None, *, with_weights=True):
        return Location(wide, "owner/base", commit)

    monkeypatch.setattr(export, "base_of", base_of)
    out = tmp_path / "out"
    arguments = ("--to", "colfolio", "--out", out, "--adapter", "--push", "a/b")
    assert colfolio("export", adapted[0], *arguments)[0] == 0
    assert pushed == [(out, "a/b", False)]
    config = json.loads((out / ADAPTER_FILE).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", commit)


def test_a_base_that_moved_is_given(adapted, wide, tmp_path, colfolio, refused):
    wide.rename(tmp_path / "moved")
    arguments = ("--to", "colfolio", "--out", tmp_path / "out")
    told = refused("export", adapted[0], *arguments, "--adapter")
    assert "--base" in told
    assert ADAPTER_FILE in told
    given = ("--base", tmp_path / "moved")
    assert colfolio("export", adapted[0], *arguments, "--adapter", *given)[0] == 0
    assert Retriever.from_pretrained(tmp_path / "out").fingerprint() == adapted[1].fingerprint()
    whole = ("--to", "colfolio", "--out", tmp_path / "whole", "--merge", *given)
    assert colfolio("export", adapted[0], *whole)[0] == 0


def test_a_base_is_renamed_in_the_file_that_the_message_names(adapted, wide, tmp_path):
    wide.rename(tmp_path / "moved")
    path = adapted[0] / ADAPTER_FILE
    values = json.loads(path.read_text()) | {"base_model_name_or_path": "../moved"}
    path.write_text(json.dumps(values))
    assert Retriever.from_pretrained(adapted[0]).fingerprint() == adapted[1].fingerprint()


def test_what_cannot_be_pushed_is_not_written(wide, tmp_path, refused, monkeypatch):
    def refuse(repo_id, *, private):
        raise CheckpointError(f"{repo_id}: hf auth login")

    monkeypatch.setattr(export, "check_push", refuse)
    monkeypatch.setattr(export, "write", None)
    arguments = ("--to", "colfolio", "--out", tmp_path / "out", "--push", "me/model")
    assert "hf auth login" in refused("export", wide, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_push_that_failed_leaves_the_export_and_says_how_to_push_it(
    wide, tmp_path, refused, pushed, monkeypatch
):
    def fail(folder, repo_id, *, private=False):
        raise CheckpointError(f"{repo_id}: was cut off")

    monkeypatch.setattr(export, "push", fail)
    out = tmp_path / "my model"
    arguments = ("--to", "colfolio", "--out", out, "--push", "me/model", "--private")
    told = " ".join(refused("export", wide, *arguments).split())
    assert f"hf upload me/model '{out}' --private" in told
    assert detect(out) == "colfolio"


@pytest.mark.parametrize("place", ["the model itself", "another folder", "a file"])
def test_a_folder_that_is_not_free_is_left_as_it_is(place, wide, tmp_path, refused):
    out = wide if place == "the model itself" else tmp_path / "out"
    if place == "another folder":
        out.mkdir()
        (out / "chapter.tex").write_text("years of work")
    elif place == "a file":
        out.write_text("years of work")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert "not free" in refused("export", wide, "--to", "colfolio", "--out", out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_dimensions_that_a_library_does_not_have_are_refused(base_folder, tmp_path, refused):
    errors = refused("export", base_folder, "--to", "colpali-engine", "--out", tmp_path / "out")
    assert "128 dimensions" in errors


def test_a_foreign_model_is_warned_of_when_it_is_loaded(wide, tmp_path, colfolio):
    colfolio("export", wide, "--to", "transformers", "--out", tmp_path / "out")
    (tmp_path / "out" / "colfolio.json").unlink()
    with pytest.warns(AssumedWarning, match="one dimension"):
        Retriever.from_pretrained(tmp_path / "out")
