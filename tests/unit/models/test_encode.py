"""What `encode_documents` and `encode_queries` accept and refuse, and `score`."""

import inspect
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from colfolio import Clip, MultiVectors, Page, maxsim, pdf_pages
from colfolio.data.collate import Collator
from colfolio.data.dataset import PAGE_DPI
from colfolio.data.documents import PdfDocument, open_document
from colfolio.data.video import load_clip
from colfolio.errors import DocumentError
from colfolio.models import document_inputs, encoding
from colfolio.models.encoding import batches_by_length, evaluating, scores_on
from colfolio.search import IndexSettings


@pytest.fixture
def make_pdf(tmp_path, random_image):
    """Writes a PDF whose pages are random images of these sizes."""

    def make(*sizes, name="report.pdf"):
        images = [
            Image.fromarray(random_image(*size, seed=seed)) for seed, size in enumerate(sizes)
        ]
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:])
        return tmp_path / name

    return make


@pytest.fixture
def make_video(tmp_path):
    """Writes a video of grey frames, ten a second."""

    def make(num_frames=12, name="clip.mp4"):
        with av.open(tmp_path / name, "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 112, 56, "yuv420p"
            for number in range(num_frames):
                pixels = np.full((56, 112, 3), 16 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return tmp_path / name

    return make


def encode_unchecked(retriever, documents):
    """Without the types that tests execute, which refuse some inputs before the code does."""
    return inspect.unwrap(type(retriever).encode_documents)(retriever, documents)


def assert_same(mine, theirs):
    assert mine.offsets.tolist() == theirs.offsets.tolist()
    torch.testing.assert_close(mine.vectors, theirs.vectors, rtol=0, atol=1e-6)


def test_pages_of_a_pdf_are_the_pixels_that_an_index_sees(shared_retriever, make_pdf):
    path = make_pdf((60, 90), (90, 60), (60, 90))
    with open_document(path) as document:
        drawn = [document.render(number, dpi=144.0) for number in (0, 1, 2)]
    index_dpi = IndexSettings.model_validate({}).dpi
    assert index_dpi == PAGE_DPI == document_inputs._PAGE_DPI == 144
    pages = pdf_pages(path)
    assert pages == [Page(path, number) for number in range(3)]
    assert_same(shared_retriever.encode_documents(pages), shared_retriever.encode_documents(drawn))


def test_a_video_file_is_its_clip_at_the_frame_rate_of_the_contract(shared_retriever, make_video):
    path = make_video()
    contract = shared_retriever.contract
    most_pixels = contract.pixel_budget.max_pixels
    clip = load_clip(path, fps=contract.frame_rate, max_pixels=most_pixels)
    assert len(clip.frames) == 3
    encoded = shared_retriever.encode_documents([path, str(path), clip])
    for row in (0, 1):
        torch.testing.assert_close(encoded[row], encoded[2], rtol=0, atol=1e-6)


def test_another_frame_rate_in_the_contract_gives_other_vectors(retriever, make_video):
    path = make_video()
    slow = retriever.eval().encode_documents([path])
    retriever.contract = retriever.contract.model_copy(update={"frame_rate": 5.0})
    assert len(retriever.encode_documents([path]).vectors) > len(slow.vectors)


def test_an_image_of_a_tiff_is_named_by_its_page(shared_retriever, random_image, tmp_path):
    images = [random_image(1584, 792, seed=seed) for seed in (0, 1)]
    path = tmp_path / "scan.tiff"
    first, second = (Image.fromarray(image) for image in images)
    first.save(path, save_all=True, append_images=[second])
    assert_same(
        shared_retriever.encode_documents([Page(path, 1)]),
        shared_retriever.encode_documents([images[1]]),
    )
    with pytest.raises(DocumentError, match=r"holds 2 images: give Page.*document 0"):
        shared_retriever.encode_documents([path])


def test_all_kinds_in_one_call_keep_their_rows(
    shared_retriever, make_pdf, make_video, random_image, tmp_path
):
    pixels = random_image(56, 84)
    Image.fromarray(pixels).save(tmp_path / "page.png")
    clip = Clip(np.stack([pixels] * 3), 0.5)
    picture = Image.fromarray(random_image(84, 28))
    page = pdf_pages(make_pdf((60, 90)))[0]
    documents = [pixels, tmp_path / "page.png", page, make_video(), clip, picture]
    together = shared_retriever.encode_documents(documents)
    alone = [shared_retriever.encode_documents([each]) for each in documents]
    assert together.offsets.tolist() == MultiVectors.cat(alone).offsets.tolist()
    assert_same(together, MultiVectors.cat(alone))


def test_an_image_that_exif_turns_takes_as_many_tokens_as_its_header_says(
    shared_retriever, tmp_path
):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    path = tmp_path / "photo.png"
    Image.new("RGB", (140, 56)).save(path, exif=exif)
    collator = shared_retriever.collator
    with document_inputs.DocumentReader([path], collator, 2.0) as reader:
        (promised,), (pixels,) = reader.num_tokens(), reader.read([0])
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (140, 56, 3)
    assert promised == collator.num_visual_tokens(pixels)


def test_files_are_opened_only_when_their_batch_comes(
    shared_retriever, random_image, tmp_path, monkeypatch
):
    paths = []
    for number in range(11):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(random_image(28, 28, seed=number)).save(paths[-1])
    opened, waiting = [], []
    load, collate = document_inputs.load_image, Collator.documents

    def counting_load(source):
        opened.append(source)
        return load(source)

    def counting_collate(self, documents):
        waiting.append(len(opened))
        opened.clear()
        return collate(self, documents)

    monkeypatch.setattr(document_inputs, "load_image", counting_load)
    monkeypatch.setattr(Collator, "documents", counting_collate)
    shared_retriever.encode_documents(paths, batch_size=3)
    assert waiting == [3, 3, 3, 2]


def test_a_pdf_is_opened_once_for_pages_that_follow_one_another(
    shared_retriever, make_pdf, monkeypatch
):
    first, second = (make_pdf(*[(60, 90)] * 3, name=f"{name}.pdf") for name in "ab")
    pages = [*pdf_pages(first), *pdf_pages(second)]
    opened, closed = [], []
    close = PdfDocument.close

    def counting_open(path):
        opened.append(path)
        return open_document(path)

    def counting_close(self):
        closed.append(self.path)
        close(self)

    monkeypatch.setattr(document_inputs, "open_document", counting_open)
    monkeypatch.setattr(PdfDocument, "close", counting_close)
    shared_retriever.encode_documents(pages, batch_size=2)
    assert opened == [first, second] * 2  # once to be measured, once to be drawn
    assert closed == opened


def test_long_clips_share_a_call_with_few(shared_retriever, monkeypatch):
    frames = np.zeros((8, 224, 224, 3), np.uint8)  # each as large as a page may be
    clips = [Clip(frames, 0.5)] * 3
    images = [np.zeros((28, 28, 3), np.uint8)] * 3
    sizes, collate = [], Collator.documents

    def watching(self, documents):
        sizes.append([self.num_visual_tokens(each) for each in documents])
        return collate(self, documents)

    monkeypatch.setattr(Collator, "documents", watching)
    shared_retriever.encode_documents([*clips, *images], batch_size=4)
    assert sizes == [[256], [256], [256], [1, 1, 1]]


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (np.zeros((56, 56), np.uint8), r"uint8 \[height, width, 3\].*uint8 \[56, 56\]"),
        (np.zeros((56, 56, 4), np.uint8), r"uint8 \[height, width, 3\]"),
        (np.zeros((3, 56, 56), np.uint8), r"uint8 \[height, width, 3\]"),
        (np.zeros((56, 56, 3), np.float32), r"uint8 \[height, width, 3\].*float32"),
        (np.zeros((0, 56, 3), np.uint8), "no area"),
        (np.zeros((1, 201, 3), np.uint8), "200 times the other"),
        (Clip(np.zeros((0, 28, 28, 3), np.uint8), 0.5), r"at least one, received uint8 \[0, 28"),
        (Clip(np.zeros((2, 28, 28, 3), np.uint8), 0.0), r"above 0 and finite, received 0\.0"),
        (Image.new("RGB", (1, 201)), "200 times the other"),
    ],
    ids=["grey", "alpha", "channels", "float", "empty", "line", "no frames", "no time", "thin"],
)
def test_pixels_that_are_no_document_are_refused_with_their_row(shared_retriever, document, reason):
    page = np.zeros((28, 28, 3), np.uint8)
    with pytest.raises(DocumentError, match=reason) as caught:
        encode_unchecked(shared_retriever, [page, document])
    assert "(document 1)" in str(caught.value)


def test_an_object_of_another_type_is_refused_with_what_is_accepted(shared_retriever):
    page = np.zeros((28, 28, 3), np.uint8)
    with pytest.raises(TypeError, match=r"document 1 is a Tensor; a document is an image.*a Page"):
        encode_unchecked(shared_retriever, [page, torch.zeros(28, 28, 3)])
    with pytest.raises(TypeError, match="document 0 is a NoneType"):
        encode_unchecked(shared_retriever, [None])


@pytest.mark.parametrize(
    "document",
    [
        "page.png",
        Path("page.png"),
        Page("report.pdf", 0),
        Image.new("RGB", (28, 28)),
        np.zeros((28, 28, 3), np.uint8),
        Clip(np.zeros((2, 28, 28, 3), np.uint8), 0.5),
    ],
    ids=lambda document: type(document).__name__,
)
def test_one_document_in_place_of_a_list_is_refused(shared_retriever, document):
    with pytest.raises(TypeError, match="takes a list of documents, received one"):
        inspect.unwrap(document_inputs.listed_documents)(document)
    assert len(shared_retriever.encode_documents(iter([]))) == 0


def test_files_that_are_no_document_are_named_with_their_row(
    shared_retriever, make_pdf, make_video, random_image, tmp_path
):
    good, cut, text = (tmp_path / f"{name}.png" for name in ("good", "cut", "text"))
    Image.fromarray(random_image(112, 112)).save(good)
    cut.write_bytes(good.read_bytes()[:2000])
    text.write_text("no picture")
    thin = tmp_path / "thin.png"
    Image.new("RGB", (1, 300)).save(thin)
    empty = tmp_path / "empty.pdf"
    empty.write_bytes(
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        b"2 0 obj<</Type/Pages/Count 0/Kids[]>>endobj\ntrailer<</Root 1 0 R/Size 3>>\n%%EOF\n"
    )
    pdf, film = make_pdf((60, 90), (60, 90)), tmp_path / "cut.mp4"
    film.write_bytes(make_video().read_bytes()[:500])
    for document, reason in (
        (cut, "is a damaged image"),
        (text, "is not an image that can be read"),
        (thin, "200 times the other"),
        (tmp_path / "none.png", "does not exist"),
        (str(tmp_path / "none.mp4"), "does not exist"),
        (film, "cannot be read|is not a video that can be read"),
        (tmp_path, "is a folder; name its files"),
        (pdf, r"a document is one page of it: give Page\(path, number\).*pdf_pages\(path\)"),
        (Page(pdf, 2), "has pages 0 to 1, no page 2"),
        (Page(str(pdf), -1), "has pages 0 to 1, no page -1"),
        (Page(empty, 0), "has no pages"),
        (Page(text, 0), "is not an image that can be read"),
    ):
        with pytest.raises(DocumentError, match=reason) as caught:
            shared_retriever.encode_documents([good, document])
        file = document.path if isinstance(document, Page) else document
        assert str(file) in str(caught.value)
        assert "(document 1" in str(caught.value)


def test_a_damaged_picture_of_pillow_is_refused_with_its_row(
    shared_retriever, random_image, tmp_path
):
    path = tmp_path / "cut.png"
    Image.fromarray(random_image(112, 112)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with (
        Image.open(path) as picture,
        pytest.raises(DocumentError, match=r"is a damaged image.*\(document 0\)"),
    ):
        shared_retriever.encode_documents([picture])


def test_bad_files_are_refused_before_any_document_is_encoded(
    shared_retriever, random_image, tmp_path, monkeypatch
):
    monkeypatch.setattr(Collator, "documents", lambda *_: 1 / 0)
    for bad in (tmp_path / "none.png", tmp_path, Page(tmp_path / "none.pdf", 0)):
        with pytest.raises(DocumentError):
            shared_retriever.encode_documents([random_image(28, 28), bad])


def test_pages_are_listed_of_pdfs_alone(tmp_path, random_image):
    Image.fromarray(random_image(28, 28)).save(tmp_path / "page.png")
    with pytest.raises(DocumentError, match=r"page\.png: is no PDF"):
        pdf_pages(tmp_path / "page.png")
    with pytest.raises(DocumentError, match="does not exist"):
        pdf_pages(str(tmp_path / "none.pdf"))


def test_something_else_among_the_queries_is_refused_with_its_row(shared_retriever):
    encode = inspect.unwrap(encoding.listed_texts)
    with pytest.raises(TypeError, match="query 1 is a int; a query is a text"):
        encode(["a", 3])


@pytest.mark.parametrize("encode", ["encode_queries", "encode_documents"])
def test_a_batch_size_below_one_is_refused(shared_retriever, encode):
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        getattr(shared_retriever, encode)([], batch_size=0)


def test_progress_is_told_after_each_batch(shared_retriever, texts, pages):
    for encode, inputs in (
        (shared_retriever.encode_queries, texts),
        (shared_retriever.encode_documents, pages),
    ):
        told = []
        encode(inputs, batch_size=3, on_progress=lambda done, total: told.append((done, total)))  # noqa: B023
        assert told[-1] == (len(inputs), len(inputs))
        assert [done for done, _ in told] == sorted({done for done, _ in told})
        assert len(told) >= len(inputs) // 3


def test_batches_hold_each_row_once_longest_first_within_their_limits():
    generator = np.random.default_rng(0)
    for batch_size, most in ((1, None), (3, None), (4, 20), (100, 7)):
        lengths = generator.integers(1, 12, 23).tolist()
        batches = batches_by_length(lengths, batch_size, most)
        rows = [row for batch in batches for row in batch]
        assert sorted(rows) == list(range(23))
        assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
        for batch in batches:
            assert len(batch) <= batch_size
            assert most is None or len(batch) == 1 or sum(lengths[row] for row in batch) <= most


def test_each_submodule_gets_back_its_own_mode(retriever):
    retriever.train()
    retriever.backbone.visual.eval()
    before = [module.training for module in retriever.modules()]
    with evaluating(retriever):
        assert not any(module.training for module in retriever.modules())
    assert [module.training for module in retriever.modules()] == before


def test_scores_are_maxsim_of_what_is_encoded(shared_retriever, texts, pages):
    queries = shared_retriever.encode_queries(texts)
    documents = shared_retriever.encode_documents(pages)
    expected = maxsim(queries, documents)
    for mine, theirs in (
        (texts, pages),
        (queries, pages),
        (texts, documents),
        (queries, documents),
    ):
        scores = shared_retriever.score(mine, theirs)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("at_a_time", [1, 9, 40, 1 << 20])
def test_how_many_documents_are_scored_at_a_time_changes_nothing(
    shared_retriever, texts, pages, at_a_time, monkeypatch
):
    queries = shared_retriever.encode_queries(texts)
    documents = shared_retriever.encode_documents(pages)
    monkeypatch.setattr(encoding, "_SCORED_AT_A_TIME", at_a_time)
    parts = list(encoding._parts(documents))
    assert sum(map(len, parts)) == len(documents)
    assert all(len(part) == 1 or len(part.vectors) <= at_a_time for part in parts)
    scores = scores_on(torch.device("cpu"), queries, documents)
    torch.testing.assert_close(scores, maxsim(queries, documents), rtol=0, atol=1e-6)


def test_nothing_to_score_gives_no_rows_or_no_columns(shared_retriever, texts, pages):
    assert shared_retriever.score([], pages).shape == (0, len(pages))
    assert shared_retriever.score(texts, []).shape == (len(texts), 0)
    assert shared_retriever.score([], []).shape == (0, 0)


def test_vectors_of_another_model_have_no_score(shared_retriever, texts):
    other = MultiVectors.from_list([torch.ones(2, shared_retriever.dim + 1)])
    with pytest.raises(ValueError, match="dimensions"):
        shared_retriever.score(texts, other)
