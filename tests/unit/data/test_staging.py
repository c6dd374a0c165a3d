"""A dataset folder holds the old files or the new ones, whenever its writer is killed."""

import errno
import shutil
from pathlib import Path

import pytest

from colfolio.data.dataset import CorpusRow, Query, load_dataset, splits_of, write_split
from colfolio.data.formats.staging import disk_errors, recover, staged
from colfolio.errors import DatasetError


def write(folder, split, text):
    corpus = [CorpusRow(text, text.encode(), "a")]
    write_split(folder, split, corpus, [Query(text, text)], {text: {text: 1}})


def read(folder):
    """The text of each split: equal in all three tables, or the dataset would not load."""
    return {split: load_dataset(folder, split).queries[0].text for split in splits_of(folder)}


@pytest.fixture
def moments(monkeypatch, tmp_path):
    """Copies of a folder as it stands before each step that changes a file in it."""
    copies = []

    def watch(folder):
        for name in ("replace", "unlink", "write_text", "mkdir"):
            original = getattr(Path, name)

            def step(path, *args, original=original, **options):
                if folder.exists() and path.is_relative_to(folder):
                    copies.append(tmp_path / "moments" / str(len(copies)))
                    shutil.copytree(folder, copies[-1])
                return original(path, *args, **options)

            monkeypatch.setattr(Path, name, step)
        return copies

    return watch


def test_a_kill_at_any_moment_leaves_the_old_split_or_the_new_one(tmp_path, moments, monkeypatch):
    folder = tmp_path / "set"
    write(folder, "train", "kept")
    write(folder, "test", "old")
    copies = moments(folder)
    write(folder, "test", "new")
    monkeypatch.undo()
    copies.append(folder)
    found = [read(copy)["test"] for copy in copies]
    assert found[0] == "old"
    assert found[-1] == "new"
    assert found == sorted(found, reverse=True)  # old until the commit, new ever after
    assert found.count("new") >= 4
    for copy, before in zip(copies, found, strict=True):
        recover(copy)
        assert read(copy) == {"train": "kept", "test": before}
        assert not (copy / ".staging").exists()
        write(copy, "test", "newer")
        assert read(copy)["test"] == "newer"


def test_removed_files_are_gone_for_readers_once_committed(tmp_path, moments, monkeypatch):
    folder = tmp_path / "set"
    write(folder, "train", "old")
    copies = moments(folder)
    with staged(folder) as staging:
        staging.path("corpus/note.txt").write_text("new")
        staging.commit([f"{name}/train-00000-of-00001.parquet" for name in ("corpus", "queries")])
    monkeypatch.undo()
    committed = [(copy / ".staging" / "commit.json").exists() for copy in copies]
    assert 0 < committed.index(True) < len(copies) - 1
    for number, copy in enumerate([*copies, folder]):
        assert splits_of(copy) == (["train"] if number < committed.index(True) else [])


def test_a_failing_writer_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "set"
    write(folder, "test", "old")

    def corpus():
        yield CorpusRow("a", b"a", "a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_split(folder, "test", corpus(), [Query("q", "q")], {"q": {"a": 1}})
    assert read(folder) == {"test": "old"}
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "corpus",
        "qrels",
        "queries",
    ]


def test_a_full_disk_is_told_and_changes_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    write(folder, "test", "old")

    def write_table(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", write_table)
    with pytest.raises(DatasetError, match=r"the disk is full.*free some space"):
        write(folder, "test", "new")
    monkeypatch.undo()
    assert read(folder) == {"test": "old"}
    assert not (folder / ".staging").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatasetError, match=r"file.*cannot be written"):
        write(tmp_path / "file" / "set", "test", "new")


def test_other_errors_of_the_system_pass_through(tmp_path):
    with pytest.raises(OSError, match="strange") as error, disk_errors(tmp_path):
        raise OSError(errno.EIO, "strange")
    assert not isinstance(error.value, DatasetError)
