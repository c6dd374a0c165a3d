from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from colfolio.commands.index import index_command
from colfolio.commands.search import search_command
from colfolio.errors import CheckpointError, ColfolioError, IndexStoreError
from colfolio.search import VectorStore


@pytest.fixture
def model(tmp_path, make_retriever):
    make_retriever(views="strips").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for number in range(3):
        page = Image.new("RGB", (850, 1100), "white")
        font = ImageFont.load_default(32)
        for line in range(4):
            place = (100, 100 + 200 * line)
            ImageDraw.Draw(page).text(place, f"page {number} line {line}", "black", font=font)
        page.save(folder / f"[page] {number}.png")
    return folder


def test_what_index_writes_search_finds(tmp_path, model, documents, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = index_command(model, documents, tmp_path / "index")
    assert (manifest.num_pages, manifest.num_views, manifest.views) == (3, 12, "strips")
    assert manifest.model == model
    assert "3 pages of 3 documents as 12 views (strips)" in capsys.readouterr().out
    hits = search_command(tmp_path / "index", "line 2", top_k=2)
    shown = capsys.readouterr().out
    assert len(hits) == 2
    for hit in hits:
        assert hit.document in shown
        assert f"{hit.score:.3f}" in shown
    assert sorted(path.name for path in (tmp_path / "hits").iterdir()) == ["hit-1.png", "hit-2.png"]
    picture = np.asarray(Image.open(tmp_path / "hits" / "hit-1.png"))
    assert picture.shape == (1100, 850, 3)
    assert (picture[..., 0] > picture[..., 2] + 50).any(), "nothing orange"


def test_pictures_of_an_earlier_search_do_not_stay(tmp_path, model, documents):
    index_command(model, documents, tmp_path / "index", views="page")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "hit-list.png").write_bytes(b"not ours")
    search_command(tmp_path / "index", "line", top_k=3, images_to=tmp_path / "pictures")
    search_command(tmp_path / "index", "line", top_k=1, images_to=tmp_path / "pictures")
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["hit-1.png", "hit-list.png"]


def test_wishes_that_cannot_be_honoured_are_errors(tmp_path, model, documents):
    index = tmp_path / "index"
    for wish in ({"views": "lines"}, {"dpi": -1.0}, {"dtype": "int8"}, {"max_bad_share": 2.0}):
        with pytest.raises(ColfolioError, match=next(iter(wish))):
            index_command(model, documents, index, **wish)
    with pytest.raises(IndexStoreError, match="no index is here"):
        search_command(index, "line")
    index_command(model, documents, index)
    with pytest.raises(ColfolioError, match="query is empty"):
        search_command(index, "  ")
    with pytest.raises(ColfolioError, match="at least 1, not 0"):
        search_command(index, "line", top_k=0)
    with pytest.raises(ColfolioError, match="best or union, not 'mean'"):
        search_command(index, "line", page_score="mean")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ColfolioError, match="pictures cannot be written"):
        search_command(index, "line", images_to=tmp_path / "file")


def test_names_with_markup_are_printed_as_they_are(tmp_path, model, documents, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index_command(model, documents, Path("index [/b]"), views="page")
    search_command(Path("index [/b]"), "line [/red]", top_k=3, images_to=Path("hits [/i]"))
    shown = capsys.readouterr().out
    for name in ("index [/b]: 3 pages", "'line [/red]'", "hits [/i]/hit-1.png", "[page] 0.png"):
        assert name in shown


def test_more_bad_documents_are_accepted_where_that_is_wished(tmp_path, model, documents, capsys):
    (documents / "bad [").mkdir()
    (documents / "bad [" / "b].pdf").write_bytes(b"nothing")
    with pytest.raises(ColfolioError, match="--max-bad-share"):
        index_command(model, documents, tmp_path / "index", views="page")
    manifest = index_command(model, documents, tmp_path / "index", views="page", max_bad_share=0.25)
    assert len(manifest.skipped) == 1
    assert "bad [/b].pdf" in capsys.readouterr().out


def test_the_model_may_move_but_not_change(tmp_path, model, documents, make_retriever):
    index_command(model, documents, tmp_path / "index")
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(IndexStoreError, match=r"--model"):
        search_command(tmp_path / "index", "line", images_to=tmp_path / "hits")
    search_command(
        tmp_path / "index", "line", images_to=tmp_path / "hits", model=str(tmp_path / "moved")
    )
    make_retriever(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(IndexStoreError, match="another model"):
        search_command(tmp_path / "index", "line", model=str(tmp_path / "other"))
    with pytest.raises(CheckpointError):
        search_command(tmp_path / "index", "line", model=str(tmp_path / "nowhere"))


def test_the_index_keeps_no_pages_where_that_is_wished(tmp_path, model, documents):
    index_command(model, documents, tmp_path / "index", store_pages=False)
    assert VectorStore(tmp_path / "index").page(0).preview is None
    (documents / "[page] 0.png").unlink()
    with pytest.raises(IndexStoreError, match="keeps no pages"):
        search_command(tmp_path / "index", "line", images_to=tmp_path / "hits")
