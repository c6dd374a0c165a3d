import multiprocessing
import random
import threading
from collections import OrderedDict

import pytest
import torch

from colfolio.training import feature_cache
from colfolio.training.feature_cache import FeatureCache, FeatureCacheSettings, row_key

MEBIBYTE = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EVERY_BIT = [0.0, -0.0, 1.0, -1.5, float("inf"), float("-inf"), float("nan"), 1e-7]


def features_of(row, tokens=4, width=8, dtype=torch.float32):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(row)).to(dtype)


def settings(ram=0, disk=0):
    """Budgets in bytes."""
    return FeatureCacheSettings(ram_mb=ram / MEBIBYTE, disk_mb=disk / MEBIBYTE)


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).tolist()


def key(row):
    return row_key(str(row).encode())


@pytest.fixture
def make_cache(tmp_path):
    """Builds caches over one folder and closes them."""
    made = []

    def make(ram=0, disk=0, folder=tmp_path / "features"):
        made.append(FeatureCache(settings(ram, disk), folder))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def on_ram(make_cache):
    return make_cache(ram=MEBIBYTE)


def on_disk(make_cache):
    return make_cache(disk=MEBIBYTE)


both_places = pytest.mark.parametrize("place", [on_ram, on_disk])


@both_places
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_out_is_what_went_in_to_the_bit(make_cache, place, dtype):
    cache = place(make_cache)
    every_bit = torch.tensor(EVERY_BIT, dtype=dtype).view(2, 4)
    for row, features in enumerate([every_bit, every_bit[:0], every_bit.t()]):
        cache.put("part", key(row), features)
        assert bits(cache.get("part", key(row))) == bits(features.contiguous())
    assert (cache.entries, cache.hits, cache.misses) == (3, 3, 0)


@both_places
def test_another_part_or_another_row_is_a_miss(make_cache, place):
    cache = place(make_cache)
    cache.put("weights 1", b"row", features_of(0))
    assert cache.get("weights 2", b"row") is None
    assert cache.get("weights 1", b"ro") is None
    assert cache.get("weights 1r", b"ow") is None
    assert not cache.has("weights 2", b"row")
    assert cache.misses == 3
    cache.put("weights 2", b"row", features_of(1))
    assert torch.equal(cache.get("weights 1", b"row"), features_of(0))
    assert torch.equal(cache.get("weights 2", b"row"), features_of(1))


@both_places
def test_keeping_one_part_forgets_the_others(make_cache, place, tmp_path):
    cache = place(make_cache)
    for part in ("old", "new"):
        cache.put(part, b"row", features_of(0))
    cache.keep_only(["new"])
    assert cache.get("old", b"row") is None
    assert torch.equal(cache.get("new", b"row"), features_of(0))
    assert cache.entries == 1
    assert len(list(tmp_path.glob("features/*.features"))) <= 1


@both_places
def test_dropping_forgets_everything_and_makes_room(make_cache, place, tmp_path):
    cache = place(make_cache)
    for row in range(3):
        cache.put("part", key(row), features_of(row))
    cache.drop()
    assert all(cache.get("part", key(row)) is None for row in range(3))
    assert (cache.entries, cache.ram_bytes, cache.disk_bytes) == (0, 0, 0)
    assert list(tmp_path.glob("features/*.features")) == []
    cache.put("part", key(0), features_of(0))
    assert torch.equal(cache.get("part", key(0)), features_of(0))


@both_places
def test_an_entry_is_free_of_the_tensor_that_was_put(make_cache, place):
    cache = place(make_cache)
    whole = features_of(0, tokens=100).requires_grad_()
    cache.put("part", b"row", whole[:4])
    with torch.no_grad():
        whole.zero_()
    kept = cache.get("part", b"row")
    assert torch.equal(kept, features_of(0, tokens=100)[:4])
    assert not kept.requires_grad
    assert kept.untyped_storage().nbytes() == kept.nbytes


@both_places
def test_features_of_inference_mode_can_be_trained_on(make_cache, place):
    cache = place(make_cache)
    with torch.inference_mode():
        cache.put("part", b"row", features_of(0))
        kept = cache.get("part", b"row")
    weight = torch.ones(8, requires_grad=True)
    (kept * weight).sum().backward()
    torch.testing.assert_close(weight.grad, features_of(0).sum(0))


def test_an_entry_that_was_written_to_is_not_served_again(make_cache):
    cache = make_cache(ram=MEBIBYTE)
    cache.put("part", b"row", features_of(0))
    cache.get("part", b"row")[1:].mul_(2)
    assert cache.get("part", b"row") is None
    assert (cache.entries, cache.ram_bytes) == (0, 0)
    cache.put("part", b"row", features_of(0))
    assert torch.equal(cache.get("part", b"row"), features_of(0))


def test_who_comes_first_stays_so_the_hit_rate_is_the_share_that_fits(make_cache):
    rows, fitting = 40, 10
    cache = make_cache(ram=fitting * features_of(0).nbytes)
    recent = OrderedDict()  # the same budget, least recently used thrown out
    recent_hits = 0
    for _ in range(2):
        for row in range(rows):
            if cache.get("part", key(row)) is None:
                cache.put("part", key(row), features_of(row))
            recent_hits += row in recent
            recent[row] = True
            recent.move_to_end(row)
            if len(recent) > fitting:
                recent.popitem(last=False)
    assert cache.hits == fitting
    assert recent_hits == 0


@pytest.mark.parametrize("seed", range(4))
def test_neither_budget_is_ever_exceeded(make_cache, tmp_path, seed):
    draw = random.Random(seed)
    ram, disk = draw.randrange(0, 9000), draw.randrange(1, 9000)
    cache = make_cache(ram, disk)
    sizes = {row: draw.randrange(0, 40) for row in range(60)}
    for row, tokens in sizes.items():
        cache.put("ab"[row % 2], key(row), features_of(row, tokens))
        assert cache.ram_bytes <= ram
        assert cache.disk_bytes <= disk
        files = tmp_path.glob("features/*.features")
        assert sum(file.stat().st_size for file in files) == cache.disk_bytes
    kept = {row for row in sizes if cache.has("ab"[row % 2], key(row))}
    assert len(kept) == cache.entries > 0
    in_ram = sum(each.features.nbytes for each in cache._kept.values())
    assert cache.ram_bytes == in_ram
    for row in kept:
        assert torch.equal(cache.get("ab"[row % 2], key(row)), features_of(row, sizes[row]))


def test_memory_is_filled_first_then_the_disk_then_nothing(make_cache):
    size = features_of(0).nbytes
    cache = make_cache(ram=2 * size, disk=2 * (size + 200))
    for row in range(6):
        cache.put("part", key(row), features_of(row))
    assert cache.ram_bytes == 2 * size
    assert 2 * size < cache.disk_bytes <= 2 * (size + 200)
    assert [cache.has("part", key(row)) for row in range(6)] == [True] * 4 + [False] * 2


def test_a_resumed_run_finds_what_is_on_disk_and_takes_it_into_memory(make_cache):
    before = make_cache(disk=MEBIBYTE)
    for row in range(5):
        before.put("part", key(row), features_of(row))
    before.close()
    assert before.entries == 0
    after = make_cache(ram=2 * features_of(0).nbytes, disk=MEBIBYTE)
    for row in range(5):
        assert torch.equal(after.get("part", key(row)), features_of(row))
    assert (after.hits, after.entries) == (5, 5)
    assert after.ram_bytes == 2 * features_of(0).nbytes
    assert after.disk_bytes == before.disk_bytes


def test_putting_a_row_again_takes_no_room(make_cache):
    for cache in (make_cache(ram=MEBIBYTE), make_cache(disk=MEBIBYTE)):
        cache.put("part", b"row", features_of(0))
        size = cache.ram_bytes, cache.disk_bytes
        cache.put("part", b"row", features_of(0))
        assert (cache.ram_bytes, cache.disk_bytes) == size


def test_a_row_that_two_threads_put_at_once_is_kept_once(make_cache, monkeypatch):
    cache, plain = make_cache(ram=MEBIBYTE), feature_cache._copy

    def copying(features):
        monkeypatch.undo()
        cache.put("part", b"row", features_of(0))  # as another thread would, meanwhile
        return plain(features)

    monkeypatch.setattr(feature_cache, "_copy", copying)
    cache.put("part", b"row", features_of(0))
    assert (cache.entries, cache.ram_bytes) == (1, features_of(0).nbytes)


def test_a_disk_without_a_folder_is_refused():
    with pytest.raises(ValueError, match="disk_mb is 5"):
        FeatureCache(FeatureCacheSettings(disk_mb=5.0), None)
    assert FeatureCache(FeatureCacheSettings(ram_mb=5.0), None).disk_bytes == 0


@pytest.mark.parametrize("budget", [-1.0, float("nan")])
def test_a_budget_that_is_no_size_is_refused(budget):
    with pytest.raises(ValueError, match="ram_mb"):
        FeatureCacheSettings(ram_mb=budget)


def test_nothing_is_kept_and_no_file_made_without_a_budget(make_cache, tmp_path):
    cache = make_cache()
    cache.put("part", b"row", features_of(0))
    assert cache.get("part", b"row") is None
    assert list(tmp_path.iterdir()) == []


def test_threads_get_only_whole_entries(make_cache):
    cache = make_cache(ram=20 * features_of(0).nbytes, disk=MEBIBYTE)
    wrong, done = [], threading.Event()

    def look():
        while not done.is_set():
            for row in range(60):
                found = cache.get("part", key(row))
                if found is not None and not torch.equal(found, features_of(row)):
                    wrong.append(row)

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    for row in range(60):
        cache.put("part", key(row), features_of(row))
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert cache.entries == 60


def _put_rows(folder, rows, budget):
    cache = FeatureCache(settings(disk=budget), folder)
    for row in rows:
        cache.put("part", key(row), features_of(row))


@pytest.mark.parametrize("fitting", [10, 100])
def test_processes_share_one_folder_and_one_budget(make_cache, tmp_path, fitting):
    budget = fitting * (features_of(0).nbytes + 150)
    forked = multiprocessing.get_context("fork")
    shares = [range(40), range(20, 60)]
    writers = [
        forked.Process(target=_put_rows, args=(tmp_path / "features", rows, budget))
        for rows in shares
    ]
    cache = make_cache(disk=budget)
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = [row for row in range(60) if cache.has("part", key(row))]
    assert len(found) == cache.entries == min(fitting, 60)
    assert cache.disk_bytes <= budget
    for row in found:
        assert torch.equal(cache.get("part", key(row)), features_of(row))


def test_the_key_of_a_row_tells_contents_apart():
    one = torch.ones(2, 3)
    keys = [
        row_key(b"ab", b"c"),
        row_key(b"a", b"bc"),
        row_key(b"abc"),
        row_key(one),
        row_key(one.T),
        row_key(one.double()),
        row_key(one.bfloat16()),
        row_key(-one),
        row_key(torch.zeros(2, 3).half()),
        row_key(torch.zeros(2, 3).bfloat16()),
        row_key(one, one),
        row_key(torch.cat([one, one])),
        row_key(torch.zeros(1)),
        row_key(torch.tensor(0.0)),
        row_key(torch.tensor([-0.0])),
        row_key(),
    ]
    assert len(set(keys)) == len(keys)
    assert row_key(one) == row_key(torch.ones(3, 2).T)


def test_the_key_of_a_row_holds_the_length_of_bytes():
    inner = b"page"
    forged = inner + b"bytes 0\n"  # how an empty second content would be written
    assert row_key(inner, b"") != row_key(forged)
