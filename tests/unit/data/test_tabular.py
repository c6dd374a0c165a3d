"""CSV and JSONL files as datasets: equals become one, and faults are named by line."""

import json

import numpy as np
import pytest
from PIL import Image

from colfolio.data.dataset import load_dataset, splits_of
from colfolio.data.pages.images import load_image
from colfolio.errors import DatasetError


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "c")):
        Image.new("RGB", (56, 28 * (number + 1)), (90 * number, 0, 0)).save(
            folder / "images" / f"{name}.png"
        )
    (folder / "images" / "copy-of-a.png").write_bytes((folder / "images" / "a.png").read_bytes())
    return folder


@pytest.fixture
def write(root):
    def write_file(text, name="set.csv"):
        (root / name).write_text(text, encoding="utf-8")
        return root / name

    return write_file


@pytest.fixture
def report(make_pdf, page, root):
    path = make_pdf(page([(72, 72, 12, "One")]), page([(72, 72, 12, "Two")], size=(300, 600)))
    return path.rename(root / "report.pdf")


def write_jsonl(write, rows, name="set.jsonl"):
    return write("".join(json.dumps(row) + "\n" for row in rows), name)


def test_a_csv_of_images_and_negatives(write):
    file = write(
        "query,image,negatives\none,images/a.png,images/b.png; images/c.png\ntwo,images/b.png,\n"
    )
    dataset = load_dataset(file, "train")
    assert [query.text for query in dataset.queries] == ["one", "two"]
    assert dataset.corpus.ids == ["images/a.png", "images/b.png", "images/c.png"]
    first, second = (query.id for query in dataset.queries)
    assert dataset.positives(first) == ["images/a.png"]
    assert dataset.negatives(first) == ["images/b.png", "images/c.png"]
    assert dataset.positives(second) == ["images/b.png"]
    assert dataset.corpus.image_size(2) == (84, 56)
    assert dataset.corpus.image(1)[0, 0].tolist() == [90, 0, 0]


def test_a_jsonl_of_document_pages(write, report):
    rows = [
        {"query": "two", "document": "report.pdf", "page": 2, "negatives": ["report.pdf#page=1"]},
        {"query": "one", "document": "report.pdf", "page": 1},
    ]
    dataset = load_dataset(write_jsonl(write, rows), "train")
    assert dataset.corpus.ids == ["report.pdf#p2", "report.pdf#p1"]
    assert dataset.corpus.documents == ["report.pdf", "report.pdf"]
    assert dataset.corpus.pages == [1, 0]
    assert dataset.negatives(dataset.queries[0].id) == ["report.pdf#p1"]
    assert dataset.corpus.image(0).shape == (1200, 600, 3)
    assert dataset.corpus.image_size(0) == (1200, 600)
    assert np.ptp(dataset.corpus.image(0)) > 0


@pytest.mark.usefixtures("report")
def test_a_page_of_a_document_is_encoded_as_it_is_rendered(write):
    rows = [
        {"query": text, "document": "report.pdf", "page": n} for n, text in ((1, "x"), (2, "y"))
    ]
    corpus = load_dataset(write_jsonl(write, rows), "train").corpus
    pages = [corpus.encoded(row) for row in range(2)]
    assert pages[0] != pages[1]
    for row, page in enumerate(pages):
        assert page.startswith(b"\x89PNG")
        np.testing.assert_array_equal(load_image(page), corpus.image(row))


def test_the_same_image_twice_is_one_row_and_the_same_query_one_query(write):
    file = write(
        "query,image\nx,images/a.png\nX y,images/copy-of-a.png\n x ,images/b.png\nx,./images/a.png"
    )
    dataset = load_dataset(file, "train")
    assert dataset.corpus.ids == ["images/a.png", "images/b.png"]
    assert [query.text for query in dataset.queries] == ["x", "X y"]
    assert dataset.positives(dataset.queries[0].id) == ["images/a.png", "images/b.png"]
    assert dataset.positives(dataset.queries[1].id) == ["images/a.png"]


def test_absolute_paths_below_the_folder_are_fine(write, root):
    file = write(f"query,image\nx,{root / 'images' / 'a.png'}\n")
    assert load_dataset(file, "train").corpus.ids == ["images/a.png"]


def test_a_column_names_the_split_of_each_row(write):
    file = write("query,image,split\nx,images/a.png,test\ny,images/b.png,train\nz,images/c.png,\n")
    assert splits_of(file) == ["test", "train"]
    assert [query.text for query in load_dataset(file, "test").queries] == ["x"]
    assert [query.text for query in load_dataset(file, "train").queries] == ["y", "z"]


def test_without_that_column_the_name_of_the_file_is_its_split(write):
    file = write("query,image\nx,images/a.png\n", "test.csv")
    assert splits_of(file) == ["test"]
    with pytest.raises(DatasetError, match=r"no split 'train'; splits found: test"):
        load_dataset(file, "train")


def test_a_missing_validation_split_comes_with_the_way_to_do_without(write):
    file = write("query,image\nx,images/a.png\n")
    hint = r"no split 'validation'; .*; set validation.split=null in the recipe to train without"
    with pytest.raises(DatasetError, match=hint):
        load_dataset(file, "validation")


def test_a_file_from_a_spreadsheet_is_read(write):
    file = write('\ufeffquery,image\r\n"a, ""b""",images/a.png\r\n')
    assert load_dataset(file, "train").queries[0].text == 'a, "b"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image\nimages/a.png\n", r"column 'query' is missing; columns found: image"),
        ("query,picture\nx,y\n", r"column 'image' \(or 'document' and 'page'\) is missing"),
        (
            "query,document\nx,report.pdf\n",
            r"column 'image' \(or 'document' and 'page'\) is missing",
        ),
        ("query,image\n ,images/a.png\n", r"line 2: the query is empty"),
        (
            "query,image\nx,images/a.png\ny,images/none.png\n",
            r"line 3: images/none.png: there is no",
        ),
        ("query,image\nx,../a.png\n", r"line 2: '../a.png' lies outside"),
        ("query,image\nx,images/../../a.png\n", r"line 2: .* lies outside"),
        ("query,image\nx,/etc/passwd\n", r"line 2: '/etc/passwd' lies outside"),
        ("query,image,negatives\nx,images/a.png,../b.png\n", r"line 2: '../b.png' lies outside"),
        ("query,document,page\nx,/etc/passwd,1\n", r"line 2: .* lies outside"),
        ("query,image\nx,\n", r"line 2: needs an image, or a document and a page"),
        ("query,image\nx,images/a.png,more\n", r"line 2: has more cells than the header"),
        (
            "query,image,document,page\nx,images/a.png,report.pdf,1\n",
            r"line 2: has both an image and",
        ),
        (
            "query,image,negatives\nx,images/a.png,images/a.png\n",
            r"line 2: .* both a positive and a neg",
        ),
        ("query,document,page\nx,report.pdf,0\n", r"line 2: report.pdf#page=0: pages count from 1"),
        ("query,document,page\nx,report.pdf,3\n", r"line 2: report.pdf: has 2 pages, so no page 3"),
        ("query,document,page\nx,report.pdf,two\n", r"line 2: page must be a number .*'two'"),
        ("query,image\nx,report.pdf\n", r"line 2: report.pdf: is a document; say which page"),
        ("query,image\n", r"the corpus has no rows"),
        ("", r"column 'query' and 'image' .* columns found: none"),
    ],
)
def test_faults_are_named_with_their_line(write, report, text, message):
    with pytest.raises(DatasetError, match=message) as error:
        load_dataset(write(text), "train")
    assert "set.csv" in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: is not valid JSON"),
        ("[1]", r"line 2: expected a JSON object, found '\[1\]'"),
        ('{"image": "images/a.png"}', r"line 2: column 'query' is missing"),
        (
            '{"query": "x", "image": "images/a.png", "negatives": 3}',
            r"line 2: negatives must be a list",
        ),
        ('{"query": "x", "image": 5}', r"line 2: 5: there is no such file"),
    ],
)
def test_faulty_json_lines_are_named(write, line, message):
    file = write('{"query": "x", "image": "images/b.png"}\n' + line + "\n", "set.jsonl")
    with pytest.raises(DatasetError, match=message):
        load_dataset(file, "train")


def test_a_damaged_document_is_named(write, root):
    (root / "bad.pdf").write_bytes(b"%PDF-1.7 nothing")
    with pytest.raises(DatasetError, match=r"line 2: .*bad.pdf: "):
        load_dataset(write("query,document,page\nx,bad.pdf,1\n"), "train")


def test_other_files_are_refused(write):
    with pytest.raises(
        DatasetError, match=r"set.xlsx: is of an unknown kind; expected .csv or .jsonl"
    ):
        load_dataset(write("query,image\n", "set.xlsx"), "train")


def test_text_that_is_not_utf8_is_refused(root):
    (root / "set.csv").write_bytes("query,image\nGröße,images/a.png\n".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"set.csv: is not UTF-8 text"):
        load_dataset(root / "set.csv", "train")
