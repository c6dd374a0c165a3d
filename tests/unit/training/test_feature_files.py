import errno
import itertools
import multiprocessing
import os
import resource
import signal
import threading
import time

import pytest
import torch

from colfolio.training import feature_files
from colfolio.training.feature_files import FeatureFiles

BUDGET = 2.0**30
RECORD_SIZE = 184  # of three tokens of four dimensions in float32
GROUP = "0" * 64


def address(row):
    return row.to_bytes(32, "big")


def features_of(row, tokens=3):
    return torch.randn(tokens, 4, generator=torch.Generator().manual_seed(row))


def written(folder, rows, tokens=3, budget=BUDGET):
    files = FeatureFiles(folder, budget)
    for row in rows:
        files.write(GROUP, address(row), features_of(row, tokens))
    return files


def only_file(folder):
    (path,) = folder.glob("*.features")
    return path


def rows_found(folder, rows, tokens=3):
    """Which rows a newcomer reads; what it reads is right."""
    files = FeatureFiles(folder, BUDGET)
    found = []
    for row in rows:
        features = files.read(GROUP, address(row))
        if features is not None:
            assert torch.equal(features, features_of(row, tokens))
            found.append(row)
    files.close()
    return found


def test_a_file_cut_anywhere_gives_the_whole_entries_and_no_other(tmp_path):
    written(tmp_path, range(3)).close()
    path = only_file(tmp_path)
    content = path.read_bytes()
    size = RECORD_SIZE
    for end in range(0, len(content) + 1, 5):
        path.write_bytes(content[:end])
        assert rows_found(tmp_path, range(3)) == list(range(end // size))
        files = FeatureFiles(tmp_path, BUDGET)
        assert [files.has(GROUP, address(row)) for row in range(3)].count(True) == end // size
        files.close()


def test_a_flipped_bit_anywhere_costs_entries_and_never_gives_a_wrong_one(tmp_path):
    written(tmp_path, range(2)).close()
    path = only_file(tmp_path)
    content = path.read_bytes()
    size = len(content) // 2
    for place in range(len(content)):
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        )
        found = rows_found(tmp_path, range(2))
        assert place // size not in found


def test_a_damaged_entry_can_be_written_again(tmp_path):
    written(tmp_path, [0]).close()
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    files = FeatureFiles(tmp_path, BUDGET)
    assert files.has(GROUP, address(0))
    assert files.read(GROUP, address(0)) is None
    assert not files.has(GROUP, address(0))
    files.write(GROUP, address(0), features_of(0))
    assert torch.equal(files.read(GROUP, address(0)), features_of(0))


def test_a_file_that_is_none_of_ours_is_skipped(tmp_path):
    (tmp_path / f"{GROUP}-x.features").write_bytes(os.urandom(5000))
    (tmp_path / f"{GROUP}-folder.features").mkdir()
    files = written(tmp_path, [0])
    assert files.fault is None
    assert rows_found(tmp_path, range(2)) == [0]


def test_entries_are_seen_by_others_as_soon_as_they_are_written(tmp_path):
    one, other = FeatureFiles(tmp_path, BUDGET), FeatureFiles(tmp_path, BUDGET)
    for row in range(4):
        assert other.read(GROUP, address(row)) is None
        one.write(GROUP, address(row), features_of(row))
        assert torch.equal(other.read(GROUP, address(row)), features_of(row))
    assert other.num_bytes == one.num_bytes


def test_an_entry_of_another_process_is_not_written_again(tmp_path):
    one, other = written(tmp_path, range(3)), written(tmp_path, range(4))
    assert other.num_bytes == 4 * one.num_bytes // 3
    assert len(list(tmp_path.glob("*.features"))) == 2


def test_what_another_process_deleted_is_gone_and_can_be_written_again(tmp_path):
    one, other = written(tmp_path, range(3)), FeatureFiles(tmp_path, BUDGET)
    assert other.has(GROUP, address(2))
    other.keep_only([])
    assert (other.addresses(), other.num_bytes) == (set(), 0)
    one.write(GROUP, address(7), features_of(7))
    assert rows_found(tmp_path, range(8)) == [7]
    assert not one.has(GROUP, address(0))
    one.write(GROUP, address(0), features_of(0))
    assert rows_found(tmp_path, range(8)) == [0, 7]


def test_a_writer_waits_for_another_so_that_both_keep_the_budget(tmp_path, monkeypatch):
    write, one_writes = os.pwrite, threading.Event()
    other = threading.Thread(target=written, args=(tmp_path, [1], 3, 1.5 * RECORD_SIZE))

    def pwrite(descriptor, content, begin):
        if not one_writes.is_set():
            one_writes.set()
            other.start()
            other.join(timeout=0.2)  # it would be done long before, if it did not wait
        return write(descriptor, content, begin)

    monkeypatch.setattr(feature_files.os, "pwrite", pwrite)
    written(tmp_path, [0], budget=1.5 * RECORD_SIZE)
    other.join()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.features")) == RECORD_SIZE
    assert rows_found(tmp_path, range(2)) == [0]


def _write_for_ever(folder, tokens):
    files = FeatureFiles(folder, BUDGET)
    for row in itertools.count():
        files.write(GROUP, address(row), features_of(row, tokens))


def test_killing_a_writer_at_any_time_never_leaves_a_wrong_entry(tmp_path):
    forked = multiprocessing.get_context("fork")
    found = []
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        writer = forked.Process(target=_write_for_ever, args=(folder, 4000))
        writer.start()
        while not list(folder.glob("*.features")):
            time.sleep(0.001)
        time.sleep(0.004 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        rows = range(2000)
        found.append(rows_found(folder, rows, tokens=4000))
        assert found[-1] == list(range(len(found[-1])))
        written(folder, range(3), tokens=4000).close()  # the next run goes on beside the torn tail
        assert rows_found(folder, rows[:3], tokens=4000) == [0, 1, 2]
    assert max(map(len, found)) > 0


@pytest.mark.parametrize("full_after", range(0, 400, 23))
def test_a_disk_that_is_full_after_any_byte_leaves_no_half_entry(tmp_path, monkeypatch, full_after):
    room, write = full_after, os.pwrite

    def pwrite(descriptor, content, begin):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(descriptor, content[:room], begin)
        room -= count
        return count

    monkeypatch.setattr(feature_files.os, "pwrite", pwrite)
    files = written(tmp_path, range(3))
    whole = [row for row in range(3) if files.has(GROUP, address(row))]
    assert "No space left" in files.fault
    assert str(tmp_path) in files.fault
    assert only_file(tmp_path).stat().st_size == len(whole) * RECORD_SIZE
    assert rows_found(tmp_path, range(3)) == whole == list(range(len(whole)))
    monkeypatch.undo()
    files.write(GROUP, address(9), features_of(9))
    assert not files.has(GROUP, address(9))
    assert all(files.read(GROUP, address(row)) is not None for row in whole)


def _write_under_a_limit(folder, size, answers):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    files = written(folder, range(50), tokens=100)
    answers.put((files.fault, len(files.addresses())))


def test_a_limit_of_the_system_on_files_ends_writing_and_not_the_run(tmp_path):
    forked = multiprocessing.get_context("fork")
    answers = forked.SimpleQueue()
    writer = forked.Process(target=_write_under_a_limit, args=(tmp_path, 20_000, answers))
    writer.start()
    fault, entries = answers.get()
    writer.join()
    assert "File too large" in fault
    assert 0 < entries < 50
    assert rows_found(tmp_path, range(50), tokens=100) == list(range(entries))


def test_an_interrupted_write_leaves_no_half_entry(tmp_path, monkeypatch):
    files, write = written(tmp_path, range(2)), os.pwrite

    def pwrite(descriptor, content, begin):
        write(descriptor, content[:7], begin)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(feature_files.os, "pwrite", pwrite)
        with pytest.raises(KeyboardInterrupt):
            files.write(GROUP, address(2), features_of(2))
    for row in (3, 2):
        files.write(GROUP, address(row), features_of(row))
    assert rows_found(tmp_path, range(4)) == [0, 1, 2, 3]


def test_a_folder_that_cannot_be_made_ends_writing_and_not_the_run(tmp_path):
    (tmp_path / "file").write_text("mine")
    files = written(tmp_path / "file" / "features", range(2))
    assert "no longer written" in files.fault
    assert files.read(GROUP, address(0)) is None


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    files = written(tmp_path / "features", range(2))
    for path in [*(tmp_path / "features").iterdir()]:
        path.unlink()
    (tmp_path / "features").rmdir()
    files.write(GROUP, address(5), features_of(5))
    assert files.fault is None
    assert rows_found(tmp_path / "features", range(6)) == [5]
