import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from colfolio.batch import MultiVectors
from colfolio.errors import IndexStoreError
from colfolio.search import IndexSettings, Searcher, VectorStore, build_index
from colfolio.search.layout import MANIFEST, PageRecord, ViewRecord
from colfolio.search.writer import create_store

PAGE = PageRecord("a.pdf", 3, (200, 100), "/somewhere/a.pdf", 5, 6, 72.0, b"preview")
BOX, REGION = (0.1, 0.2, 0.3, 0.4), (0.0, 0.1, 0.5, 0.6)
NAMES = {"model": "m", "fingerprint": "f", "views": "strips", "skipped": ("b.pdf: damaged",)}


def write(folder: Path, vectors: MultiVectors, dtype="float32", dim=8):
    with create_store(folder, dim, dtype) as store:
        views = [ViewRecord(0, row, BOX, REGION, (28, 56)) for row in range(len(vectors))]
        store.add([PAGE], views, vectors)
        store.add([PAGE], [], None)
        return store.commit(**NAMES)


def rows(*lengths: int) -> MultiVectors:
    generator = torch.Generator().manual_seed(0)
    return MultiVectors.from_list([torch.randn(n, 8, generator=generator) for n in lengths])


def test_what_was_written_is_read(tmp_path):
    vectors = rows(3, 1, 7)
    manifest = write(tmp_path / "index", vectors)
    store = VectorStore(tmp_path / "index")
    assert store.manifest == manifest
    assert (manifest.num_documents, manifest.num_pages, manifest.num_views) == (1, 2, 3)
    assert torch.equal(torch.cat(list(store.vectors())), vectors.vectors)
    views = store.views()
    assert views.lengths.tolist() == [3, 1, 7]
    assert views.numbers.tolist() == [0, 1, 2]
    assert views.page_ids.tolist() == [0, 0, 0]
    assert views.sizes.tolist() == [[28, 56]] * 3
    assert views.boxes[1].tolist() == pytest.approx(BOX)
    assert views.regions[1].tolist() == pytest.approx(REGION)
    assert store.pages() == [("a.pdf", 3)] * 2
    assert store.page(1) == PAGE


def test_float16_rounds_to_nearest(tmp_path):
    vectors = rows(5, 4)
    write(tmp_path / "index", vectors, dtype="float16")
    stored = torch.cat(list(VectorStore(tmp_path / "index").vectors()))
    assert torch.equal(stored, vectors.vectors.half())
    assert ((stored.float() - vectors.vectors).abs() <= 2**-11 * vectors.vectors.abs() + 1e-7).all()


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), 1e6])
def test_vectors_that_cannot_be_stored_are_refused_by_the_name_of_their_view(tmp_path, worst):
    vectors = rows(3, 2, 4)
    vectors.vectors[4, 5] = worst  # the last vector of the second view
    with pytest.raises(IndexStoreError, match=r"a\.pdf, page 4, view 2: .*finite"):
        write(tmp_path / "index", vectors, "float16")
    assert not (tmp_path / "index").exists()


def test_a_build_that_never_commits_leaves_the_index_before_it(tmp_path):
    write(tmp_path / "index", rows(2))
    before = sorted(path.name for path in (tmp_path / "index").iterdir())
    with create_store(tmp_path / "index", 8, "float32") as store:
        store.add([PAGE], [ViewRecord(0, 0, BOX, REGION, (28, 28))], rows(4))
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == before
    assert torch.equal(torch.cat(list(VectorStore(tmp_path / "index").vectors())), rows(2).vectors)


def test_a_new_index_replaces_the_old_one_whole(tmp_path):
    write(tmp_path / "index", rows(2))
    write(tmp_path / "index", rows(5, 1))
    assert VectorStore(tmp_path / "index").manifest.num_vectors == 6
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_two_builds_never_write_at_once(tmp_path):
    with (
        create_store(tmp_path / "index", 8, "float32"),
        pytest.raises(IndexStoreError, match="another build"),
    ):
        write(tmp_path / "index", rows(2))


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.pdf").write_bytes(b"years of work")
    with pytest.raises(IndexStoreError, match=r"thesis\.pdf"):
        write(tmp_path, rows(2))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.pdf"]


def test_a_file_is_no_place_for_an_index(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(IndexStoreError, match="cannot be written"):
        write(tmp_path / "file", rows(2))


def test_a_missing_index_is_refused(tmp_path):
    with pytest.raises(IndexStoreError, match="no index is here"):
        VectorStore(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"x": 2}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    write(tmp_path / "index", rows(2))
    (tmp_path / "index" / MANIFEST).write_text(text)
    with pytest.raises(IndexStoreError, match="is damaged"):
        VectorStore(tmp_path / "index")


def test_another_format_is_refused(tmp_path):
    write(tmp_path / "index", rows(2))
    path = tmp_path / "index" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(IndexStoreError, match="format 99"):
        VectorStore(tmp_path / "index")


def test_missing_and_damaged_tables_are_refused(tmp_path):
    write(tmp_path / "whole", rows(300, 400))
    data = sorted(
        path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.lance")
    )
    files = [path for path in data if (tmp_path / "whole" / path).is_file()]
    folders = [path for path in data if (tmp_path / "whole" / path).is_dir()]
    assert len(files) >= 2
    assert len(folders) == 2
    for number, path in enumerate(files + folders):
        index = tmp_path / f"damaged-{number}"
        shutil.copytree(tmp_path / "whole", index)
        if path in files:
            (index / path).write_bytes((index / path).read_bytes()[:-40])
        else:
            shutil.rmtree(index / path)
        with pytest.raises(IndexStoreError, match="damaged"):
            read_all(index)


def test_changed_vectors_are_refused(tmp_path):
    write(tmp_path / "index", rows(300, 400))
    (generation,) = (tmp_path / "index").glob("generation-*")
    file = max(generation.glob("views.lance/data/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(IndexStoreError, match="damaged"):
        read_all(tmp_path / "index")


def read_all(index: Path) -> None:
    store = VectorStore(index)
    store.pages()
    store.views()
    store.page(0)
    list(store.vectors())


def test_another_model_or_dimension_is_refused(tmp_path, make_encoder, pages):
    build_index(make_encoder(), pages, tmp_path / "index", IndexSettings(), model="first")
    with pytest.raises(IndexStoreError, match=r"another model.*first"):
        Searcher(tmp_path / "index", make_encoder(name="second"))
    with pytest.raises(IndexStoreError, match=r"16 dimensions.*makes 8"):
        Searcher(tmp_path / "index", make_encoder(dim=8))


BUILD = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from fake_encoder import FakeEncoder
from colfolio.search import IndexSettings, SourcePage, build_index
from colfolio.search import writer
import numpy as np
writer._PART_BYTES = 1

def pages():
    for number in range(10**6):
        image = np.random.default_rng(number).integers(0, 256, (28, 280, 3), np.uint8)
        yield SourcePage("endless.pdf", number, image)
        if number % 50 == 0:
            print(number, flush=True)

import colfolio.search.index as index
index._WINDOW_BYTES = 1
build_index(FakeEncoder(), pages(), Path({out!r}), IndexSettings())
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_new", [False, True])
def test_a_killed_build_leaves_the_index_before_it(tmp_path, encoder, pages, is_new):
    index = tmp_path / "index"
    if not is_new:
        build_index(encoder, pages, index, IndexSettings())
        before = Searcher(index, encoder).search("1,2,3")
    script = BUILD.format(here=str(Path(__file__).parent), out=str(index))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as build:
        build.stdout.readline()
        time.sleep(0.5)
        build.kill()
    if is_new:
        with pytest.raises(IndexStoreError, match="no index is here"):
            VectorStore(index)
    else:
        assert Searcher(index, encoder).search("1,2,3") == before
    left = [path for path in index.iterdir() if path.is_dir()]
    assert len(left) == (1 if is_new else 2)
    build_index(encoder, pages, index, IndexSettings())
    assert len(list(index.iterdir())) == 2
    assert len(Searcher(index, encoder).pages) == len(pages)


@pytest.mark.slow
def test_a_full_disk_is_an_error_that_names_the_index(tmp_path):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
    script = limit + BUILD.format(here=str(Path(__file__).parent), out=str(tmp_path / "i"))
    run = subprocess.run(
        [sys.executable, "-c", script.replace("_PART_BYTES = 1\n", "_PART_BYTES = 50_000\n")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "IndexStoreError" in run.stderr
    assert "cannot be written" in run.stderr
    assert not (tmp_path / "i").exists()
