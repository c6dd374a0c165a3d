"""Files written aside in a folder, then put in their places together or not at all.

New files are written to `.staging/`; `.staging/commit.json` then says that they count, and they are
moved. Whoever is killed before that leaves the old files, whoever is killed after it the new ones:
readers ask `present` where a file is, and the next writer finishes the moves.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from colfolio.errors import DatasetError

_STAGING = ".staging"
_COMMIT = "commit.json"


class Staging:
    """Files written aside in a folder, then put in their places together.

    An unfinished commit of a killed process is finished first, its unfinished files are dropped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = folder / _STAGING
        self._names: list[str] = []
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            recover(folder)

    def path(self, name: str) -> Path:
        """Where to write the file that shall stand at `name`, relative to the folder."""
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._names.append(name)
        return path

    def commit(self, removed: Sequence[str] = ()) -> None:
        """Put every file in its place, in the order they were asked for; remove the named ones."""
        for name in self._names:
            _sync(self._root / name)
        aside = self._root / (_COMMIT + ".aside")
        aside.write_text(json.dumps({"files": self._names, "removed": list(removed)}))
        _sync(aside)
        aside.replace(self._root / _COMMIT)
        recover(self.folder)

    def discard(self) -> None:
        """Forget the files."""
        shutil.rmtree(self._root, ignore_errors=True)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Staging]:
    """A `Staging` that is discarded when its block fails; the block calls `commit`."""
    staging = Staging(folder)
    try:
        with disk_errors(folder):
            yield staging
    except BaseException:
        if not (folder / _STAGING / _COMMIT).exists():
            staging.discard()
        raise


def recover(folder: Path) -> None:
    """Finish a commit that was cut off, and drop files that were never committed."""
    journal = _journal(folder)
    for name in journal["files"]:
        aside = folder / _STAGING / name
        if aside.exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            aside.replace(folder / name)
    for name in journal["removed"]:
        (folder / name).unlink(missing_ok=True)
    (folder / _STAGING / _COMMIT).unlink(missing_ok=True)
    shutil.rmtree(folder / _STAGING, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or missing rights into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DatasetError(
                f"{folder}: the disk is full; the dataset there is unchanged and what was finished "
                "is kept: free some space and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DatasetError(
                f"{error.filename or folder}: cannot be written ({error.strerror}); "
                "choose another folder"
            ) from error
        raise


def present(folder: Path) -> dict[str, Path]:
    """The README and every Parquet file by relative name, seen through an unfinished commit."""
    found = {}
    for pattern in ("README.md", "*.parquet", "[!.]*/**/*.parquet"):
        found |= {path.relative_to(folder).as_posix(): path for path in folder.glob(pattern)}
    journal = _journal(folder)
    for name in journal["files"]:
        aside = folder / _STAGING / name
        if aside.exists():
            found[name] = aside
    return {name: path for name, path in found.items() if name not in journal["removed"]}


def holds_tables(folder: Path) -> bool:
    """Whether any Parquet file is in a folder or below it."""
    return any(name.endswith(".parquet") for name in present(folder))


def _journal(folder: Path) -> dict[str, list[str]]:
    try:
        return json.loads((folder / _STAGING / _COMMIT).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {"files": [], "removed": []}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
