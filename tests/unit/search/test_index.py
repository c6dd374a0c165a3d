import io
import threading
import time
from pathlib import Path

import numpy as np
import pypdfium2
import pytest
from PIL import Image

from colfolio.data.dataset import CorpusRow, Query, write_split
from colfolio.data.documents import PdfDocument
from colfolio.errors import ColfolioError, DatasetError, DocumentError
from colfolio.search import IndexSettings, Progress, Searcher, VectorStore, build_index
from colfolio.search.sources import FolderPages, ahead


def write_image(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (56, 84), (grey, grey, grey)).save(path)


def write_pdf(path: Path, pages: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = pypdfium2.PdfDocument.new()
    for page in range(pages):
        document.new_page(60 + page, 90)
    document.save(path)


def test_a_folder_is_indexed_in_order_of_path_and_page(tmp_path, encoder):
    documents = tmp_path / "documents"
    write_image(documents / "b" / "scan.png", 40)
    write_image(documents / "c.jpg", 40)
    write_pdf(documents / "a.pdf", 3)
    seen: list[Progress] = []
    manifest = build_index(
        encoder, documents, tmp_path / "i", IndexSettings(), model="m", on_progress=seen.append
    )
    store = VectorStore(tmp_path / "i")
    assert store.pages() == [
        ("a.pdf", 0),
        ("a.pdf", 1),
        ("a.pdf", 2),
        ("b/scan.png", 0),
        ("c.jpg", 0),
    ]
    assert (manifest.num_documents, manifest.num_pages, manifest.model) == (3, 5, "m")
    assert seen[-1] == Progress(1.0, 5, 5)
    assert store.page(1).source == str(documents / "a.pdf")
    assert store.page(1).size == (180, 122)


def test_one_file_is_an_index_of_its_own(tmp_path, encoder):
    write_pdf(tmp_path / "a.pdf", 2)
    build_index(encoder, tmp_path / "a.pdf", tmp_path / "i", IndexSettings())
    assert VectorStore(tmp_path / "i").pages() == [("a.pdf", 0), ("a.pdf", 1)]


def test_one_damaged_document_among_many_is_left_out_and_listed(tmp_path, encoder):
    for number in range(99):
        write_image(tmp_path / "documents" / f"{number:03}.png", number)
    (tmp_path / "documents" / "050b.pdf").write_bytes(b"%PDF-1.7 and nothing else")
    manifest = build_index(encoder, tmp_path / "documents", tmp_path / "i", IndexSettings())
    assert manifest.num_pages == 99
    (reason,) = manifest.skipped
    assert "050b.pdf" in reason
    assert "damaged" in reason


def test_more_than_one_damaged_document_in_a_hundred_is_an_error(tmp_path, encoder):
    for number in range(98):
        write_image(tmp_path / "documents" / f"{number:03}.png", number)
    for name in ("bad-1.pdf", "bad-2.png"):
        (tmp_path / "documents" / name).write_bytes(b"nothing")
    with pytest.raises(DocumentError, match=r"(?s)2 of 100 .*1%.*max-bad-share.*bad-1.*bad-2"):
        build_index(encoder, tmp_path / "documents", tmp_path / "i", IndexSettings())
    assert not (tmp_path / "i").exists()


@pytest.fixture
def unreadable(monkeypatch):
    """Pages of PDFs that cannot be rendered."""
    pages, render = set(), PdfDocument.render

    def fail(self, page, *, dpi):
        if page in pages:
            raise DocumentError(self.path, f"page {page + 1} is damaged")
        return render(self, page, dpi=dpi)

    monkeypatch.setattr(PdfDocument, "render", fail)
    return pages


def test_a_document_with_a_readable_page_is_noted_and_is_not_a_bad_one(tmp_path, unreadable):
    write_pdf(tmp_path / "a.pdf", 3)
    unreadable |= {0, 2}
    source = FolderPages(tmp_path, dpi=72.0, max_bad_share=0.0)
    assert [page.page for page in source] == [1]
    (note,) = source.skipped
    assert "a.pdf: 2 of 3 pages are left out: page 1 is damaged" in note


def test_a_document_without_a_readable_page_is_a_bad_one(tmp_path, unreadable):
    write_pdf(tmp_path / "a.pdf", 2)
    unreadable |= {0, 1}
    with pytest.raises(DocumentError, match=r"(?s)1 of 1 .*a\.pdf: none of its 2 pages.*page 1 is"):
        list(FolderPages(tmp_path, dpi=72.0, max_bad_share=0.5))


def test_a_corpus_is_indexed_in_its_order(tmp_path, encoder):
    file = io.BytesIO()
    Image.new("RGB", (56, 28), "red").save(file, "PNG")
    corpus = [CorpusRow(f"c{row}", file.getvalue(), "doc", page=9 - row) for row in range(3)]
    for split in ("train", "test"):
        write_split(tmp_path / "d", split, corpus, [Query("q", "text")], {"q": {"c1": 1}})
    with pytest.raises(ColfolioError, match="train, test; name one"):
        build_index(encoder, tmp_path / "d", tmp_path / "i", IndexSettings())
    build_index(encoder, tmp_path / "d", tmp_path / "i", IndexSettings(), split="test")
    assert VectorStore(tmp_path / "i").pages() == [("doc", 9), ("doc", 8), ("doc", 7)]


def test_documents_below_a_folder_named_corpus_are_documents(tmp_path, encoder):
    write_pdf(tmp_path / "d" / "corpus" / "a.pdf", 1)
    build_index(encoder, tmp_path / "d", tmp_path / "i", IndexSettings())
    assert VectorStore(tmp_path / "i").pages() == [("corpus/a.pdf", 0)]


def test_tables_may_lie_where_the_readme_says(tmp_path, encoder):
    file = io.BytesIO()
    Image.new("RGB", (56, 28), "red").save(file, "PNG")
    corpus = [CorpusRow("c", file.getvalue(), "doc", page=4)]
    folder = tmp_path / "d"
    write_split(folder, "test", corpus, [Query("q", "text")], {"q": {"c": 1}})
    readme = (folder / "README.md").read_text()
    for config in ("corpus", "queries", "qrels"):
        (folder / config).rename(folder / f"of-{config}")
        readme = readme.replace(f"{config}/", f"of-{config}/")
    (folder / "README.md").write_text(readme)
    build_index(encoder, folder, tmp_path / "i", IndexSettings())
    assert VectorStore(tmp_path / "i").pages() == [("doc", 4)]


def test_a_table_of_queries_and_pages_is_a_dataset(tmp_path, encoder):
    write_pdf(tmp_path / "a.pdf", 3)
    (tmp_path / "test.csv").write_text("query,document,page\nsomething,a.pdf,2\n")
    build_index(encoder, str(tmp_path / "test.csv"), tmp_path / "i", IndexSettings())
    assert VectorStore(tmp_path / "i").pages() == [("a.pdf", 1)]


def test_what_is_no_folder_here_is_looked_for_on_the_hub(tmp_path, encoder, monkeypatch):
    asked = []

    def download(name):
        asked.append(name)
        raise DatasetError("no such dataset")

    monkeypatch.setattr("colfolio.data.dataset.hub.download", download)
    with pytest.raises(DatasetError, match="no such dataset"):
        build_index(encoder, "some/set", tmp_path / "i", IndexSettings(), split="test")
    assert asked == ["some/set"]


def test_a_split_of_plain_documents_is_refused(tmp_path, encoder):
    write_pdf(tmp_path / "a.pdf", 1)
    with pytest.raises(ColfolioError, match="no split 'test'"):
        build_index(encoder, tmp_path / "a.pdf", tmp_path / "i", IndexSettings(), split="test")


def test_pages_without_any_view_are_refused(tmp_path, encoder):
    write_pdf(tmp_path / "blank.pdf", 2)
    with pytest.raises(ColfolioError, match="2 pages without a single view"):
        build_index(encoder, tmp_path / "blank.pdf", tmp_path / "i", IndexSettings(views="strips"))
    assert not (tmp_path / "i").exists()


def test_batches_hold_images_of_one_size(tmp_path, encoder, pages):
    build_index(encoder, pages, tmp_path / "i", IndexSettings(views="page"))
    assert all(len(sizes) == 1 for sizes in encoder.batches)
    assert len(encoder.batches) == len({page.image.shape for page in pages})


def test_windows_never_change_the_index(tmp_path, encoder, pages, monkeypatch):
    build_index(encoder, pages, tmp_path / "one", IndexSettings(views="tiles"))
    monkeypatch.setattr("colfolio.search.index._WINDOW_BYTES", 1)
    monkeypatch.setattr("colfolio.search.writer._PART_BYTES", 1)
    build_index(encoder, pages, tmp_path / "many", IndexSettings(views="tiles"))
    one, many = (Searcher(tmp_path / name, encoder) for name in ("one", "many"))
    assert one.store.manifest.checksum == many.store.manifest.checksum
    assert one.search("1,2,3 4,5,6") == many.search("1,2,3 4,5,6")


def test_an_error_while_rendering_reaches_the_caller_and_leaves_nothing(tmp_path, encoder, pages):
    def failing():
        yield from pages
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build_index(encoder, failing(), tmp_path / "i", IndexSettings())
    assert not (tmp_path / "i").exists()


def test_the_thread_ahead_ends_with_its_reader():
    made = []

    def endless():
        while True:
            made.append(len(made))
            yield made[-1]

    before = threading.active_count()
    items = ahead(endless(), depth=3)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    time.sleep(0.05)
    items.close()
    assert threading.active_count() == before
    assert len(made) <= 10


def test_stored_pages_are_grey_and_small(tmp_path, encoder, pages):
    image = np.random.default_rng(0).integers(0, 255, (1754, 1240, 3), dtype=np.uint8)
    big = [page.__class__("a", 0, image) for page in pages[:1]]
    build_index(encoder, big, tmp_path / "i", IndexSettings(views="tiles"))
    preview = Image.open(io.BytesIO(VectorStore(tmp_path / "i").page(0).preview))
    assert preview.mode == "L"
    assert preview.size == (622, 880)
