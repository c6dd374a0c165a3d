"""A folder takes its name when it is whole, and nothing that we did not write goes for it."""

from pathlib import Path

import pytest
from adapters import SMALL

from colfolio.errors import CheckpointError
from colfolio.models import Retriever, add_lora, save_adapter
from colfolio.models.files import parse_json, whole_folder
from colfolio.models.formats import TARGETS, Found, write

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.fixture
def saved(tmp_path, shared_retriever):
    shared_retriever.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def contents(folder):
    """Every file below a folder, with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("years of work")


def write_new(folder, name="new.txt", meanwhile=lambda: None):
    with whole_folder(folder) as aside:
        (aside / name).write_text("new")
        meanwhile()


@pytest.mark.parametrize("config", ['{"name": "my web app"}', "{", "[]", '{"model_type": "bert"}'])
def test_a_folder_with_a_configuration_of_its_own_is_not_replaced(
    config, tmp_path, shared_retriever
):
    folder = tmp_path / "project"
    put(folder, "thesis/chapter1.tex")
    (folder / "config.json").write_text(config)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint of Colfolio"):
        shared_retriever.save_pretrained(folder)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["notes.md", "README.md", "thesis/config.json", "1_Dense/mine.txt", ".git/HEAD"]
)
def test_a_file_of_the_user_in_a_checkpoint_keeps_it_from_being_replaced(
    name, saved, shared_retriever
):
    put(saved, name)
    before = contents(saved.parent)
    with pytest.raises(CheckpointError, match=f"holds .*{name}.*choose another folder"):
        shared_retriever.save_pretrained(saved)
    assert contents(saved.parent) == before


def test_many_files_of_the_user_are_counted(saved, shared_retriever):
    put(saved, *(f"page{number}.png" for number in range(9)))
    with pytest.raises(CheckpointError, match=r"page0\.png.* and 4 more"):
        shared_retriever.save_pretrained(saved)


def test_an_adapter_replaces_no_folder_of_others_and_none_with_their_files(retriever, tmp_path):
    add_lora(retriever, SMALL, seed=0)
    foreign, own = tmp_path / "peft", tmp_path / "own"
    put(foreign, "optimizer.pt", "adapter_config.json")
    save_adapter(retriever, own, "base")
    save_adapter(retriever, own, "base")
    put(own, "optimizer.pt")
    before = contents(tmp_path)
    for folder, words in ((foreign, "no checkpoint"), (own, r"holds optimizer\.pt")):
        with pytest.raises(CheckpointError, match=words):
            save_adapter(retriever, folder, "base")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("target", TARGETS)
def test_what_any_format_writes_but_its_card_is_known_and_replaced(
    target, make_retriever, tmp_path
):
    retriever = make_retriever(dim=128)
    config, weights = retriever.backbone.config, retriever.weights()
    found = Found("any", config, weights, retriever.tokenizer, retriever.contract)
    write(found, tmp_path / "out", target)
    (tmp_path / "out" / "README.md").unlink(missing_ok=True)
    retriever.save_pretrained(tmp_path / "out")
    loaded = Retriever.from_pretrained(tmp_path / "out")
    assert loaded.fingerprint() == retriever.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_followed_and_stays(saved, make_retriever, tmp_path):
    link, broken = tmp_path / "link", tmp_path / "broken"
    link.symlink_to(saved)
    broken.symlink_to(tmp_path / "elsewhere")
    other = make_retriever(seed=1)
    for path, real in ((link, saved), (broken, tmp_path / "elsewhere")):
        other.save_pretrained(path)
        assert path.is_symlink()
        assert Retriever.from_pretrained(real).fingerprint() == other.fingerprint()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "link", "broken", "elsewhere"}


def test_links_in_a_circle_lead_nowhere(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match="leads nowhere"):
        write_new(tmp_path / "a")


@pytest.mark.parametrize("name", ["model", "model/", "./model", "model/.", "model/../model"])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_folder_is_the_same_however_it_is_named(
    name, is_new, shared_retriever, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if not is_new:
        shared_retriever.save_pretrained("model")
    shared_retriever.save_pretrained(name)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = Retriever.from_pretrained("model")
    assert loaded.fingerprint() == shared_retriever.fingerprint()


@pytest.mark.parametrize("name", [".", "..", "../model"])
def test_the_folder_that_one_stands_in_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(CheckpointError, match="this process works in"):
        write_new(Path(name))
    write_new(Path("new"))
    assert contents(tmp_path) == {"model/new/new.txt": b"new"}


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2])
def test_what_was_there_is_there_again_if_the_swap_fails(
    error, at, saved, make_retriever, shared_retriever, monkeypatch
):
    rename, calls = Path.rename, []

    def fail(path, target):
        calls.append(path)
        if len(calls) == at:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(error)):
        make_retriever(seed=1).save_pretrained(saved)
    assert len(calls) == at + (at == 2)
    assert Retriever.from_pretrained(saved).fingerprint() == shared_retriever.fingerprint()
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("was_there", [False, True])
def test_of_two_that_write_one_folder_at_once_the_first_is_kept(was_there, tmp_path):
    folder = tmp_path / "out"
    if was_there:
        folder.mkdir()
    with pytest.raises(CheckpointError, match="was free, and something was put there"):
        write_new(folder, "second.txt", meanwhile=lambda: write_new(folder, "first.txt"))
    assert contents(tmp_path) == {"out/first.txt": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_put_into_a_checkpoint_while_another_is_written_is_kept(saved):
    before = contents(saved)
    with pytest.raises(CheckpointError, match=r"holds notes\.txt"):
        write_new(saved, meanwhile=lambda: put(saved, "notes.txt"))
    assert contents(saved) == before | {"notes.txt": b"years of work"}
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_checkpoint_that_went_while_another_was_written_is_written_anew(saved, tmp_path):
    write_new(saved, meanwhile=lambda: saved.rename(tmp_path / "moved"))
    assert contents(saved) == {"new.txt": b"new"}


@pytest.mark.parametrize(
    "name", ["config.json", "colfolio.json", "tokenizer.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("levels", [120, 900, 100_000])
def test_a_file_nested_deeper_than_any_is_refused_by_name(name, levels, saved):
    if "index" in name:
        (saved / "model.safetensors").unlink()
    (saved / name).write_text('{"a":' * levels + "1" + "}" * levels)
    with pytest.raises(CheckpointError, match=name):
        Retriever.from_pretrained(saved)


def test_depth_is_counted_in_objects_and_lists_together():
    assert parse_json('[{"a": [1, {}]}]') == [{"a": [1, {}]}]
    assert parse_json("[" * 99 + "1" + "]" * 99)
    for text in ('[{"a":' * 60 + "1" + "}]" * 60, "[" * 101 + "1" + "]" * 101, DEEP):
        with pytest.raises(ValueError, match="nested deeper than 100 levels"):
            parse_json(text)
