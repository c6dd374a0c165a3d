"""The ViDoRe/BEIR layout: what is written is what is read, and what does not fit is named."""

import io
import json
import socket
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from colfolio.data.dataset import CorpusRow, Query, load_dataset, splits_of, write_split
from colfolio.errors import DatasetError


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (28, 28 * n, 3), dtype=np.uint8) for n in (1, 3, 2)]


@pytest.fixture
def rows(images):
    box = (0.1, 0.25, 0.5, 0.3)
    return [
        CorpusRow("a.pdf#p1-h1", encoded(images[0]), "a.pdf", 0, box, "heading"),
        CorpusRow("a.pdf#p3-w1", encoded(images[1]), "a.pdf", 2, box, "words"),
        CorpusRow("b/c.pdf#p1", encoded(images[2]), "b/c.pdf", 0, None, ""),
    ]


QUERIES = [Query("q1", "Über uns", "heading", True), Query("q2", "two", "words"), Query("q3", "3")]
QRELS = {
    "q1": {"a.pdf#p1-h1": 1, "b/c.pdf#p1": 0},
    "q2": {"a.pdf#p3-w1": 2},
    "q3": {"b/c.pdf#p1": 1},
}


@pytest.fixture
def folder(tmp_path, rows):
    write_split(tmp_path / "set", "test", rows, QUERIES, QRELS)
    return tmp_path / "set"


def rewrite(folder, config, change):
    """Replace a table of the split by what `change` makes of it."""
    path = folder / config / "test-00000-of-00001.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def test_what_is_written_is_read(folder, rows, images):
    dataset = load_dataset(folder, "test")
    corpus = dataset.corpus
    assert dataset.name == "set"
    assert dataset.split == "test"
    assert dataset.queries == QUERIES
    assert dataset.qrels == QRELS
    assert corpus.ids == [row.id for row in rows]
    assert corpus.documents == ["a.pdf", "a.pdf", "b/c.pdf"]
    assert corpus.pages == [0, 2, 0]
    assert corpus.kinds == ["heading", "words", ""]
    assert corpus.boxes[0] == pytest.approx((0.1, 0.25, 0.5, 0.3))
    assert corpus.boxes[2] is None
    for row, image in enumerate(images):
        np.testing.assert_array_equal(corpus.image(row), image)
        assert corpus.image_size(row) == image.shape[:2]
        assert corpus.encoded(row) == rows[row].image


def test_judgements_of_zero_are_negatives(folder):
    dataset = load_dataset(folder, "test")
    assert dataset.positives("q1") == ["a.pdf#p1-h1"]
    assert dataset.negatives("q1") == ["b/c.pdf#p1"]


def test_datasets_loads_every_table_and_decodes_images(folder, images, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    options = {"split": "test", "cache_dir": str(tmp_path / "cache")}
    corpus = datasets.load_dataset(str(folder), "corpus", **options)
    assert corpus.column_names == ["corpus-id", "image", "doc-id", "page-number", "box", "kind"]
    for row, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(corpus[row]["image"].convert("RGB")), image)
    assert corpus[0]["box"] == pytest.approx([0.1, 0.25, 0.5, 0.3])
    queries = datasets.load_dataset(str(folder), "queries", **options)
    assert queries["query"][:] == ["Über uns", "two", "3"]
    qrels = datasets.load_dataset(str(folder), "qrels", **options)
    assert qrels[0] == {"query-id": "q1", "corpus-id": "a.pdf#p1-h1", "score": 1}


def test_splits_are_written_one_by_one_and_listed_in_their_order(folder, rows):
    before = load_dataset(folder, "test").fingerprint
    for split in ("extra", "validation", "train"):
        write_split(folder, split, rows[:1], QUERIES[:1], {"q1": {rows[0].id: 1}})
    assert splits_of(folder) == ["train", "validation", "test", "extra"]
    assert load_dataset(folder, "test").fingerprint == before
    write_split(folder, "test", rows[:1], QUERIES[:1], {"q1": {rows[0].id: 1}})
    assert len(load_dataset(folder, "test").corpus) == 1
    assert splits_of(folder) == ["train", "validation", "test", "extra"]


def test_what_a_readme_says_is_kept_when_a_split_is_added(folder, rows):
    readme = folder / "README.md"
    readme.write_text(
        readme.read_text().replace("---\n", "---\nlicense: cc0-1.0\n", 1) + "My words.\n"
    )
    write_split(folder, "train", rows[:1], QUERIES[:1], {"q1": {rows[0].id: 1}})
    text = readme.read_text()
    assert "license: cc0-1.0" in text
    assert text.endswith("My words.\n")
    assert text.count("split: train") == 3


def test_a_split_that_datasets_would_refuse_is_refused(tmp_path, rows):
    with pytest.raises(DatasetError, match=r"'a/b' cannot name a split"):
        write_split(tmp_path / "set", "a/b", rows, QUERIES, QRELS)
    assert not (tmp_path / "set" / ".staging").exists()


def test_existing_vidore_datasets_are_read(tmp_path, images):
    """Integer ids and underscores as in ViDoRe v3, no paths, shards of several files."""
    image_type = pa.struct([("bytes", pa.binary())])
    (tmp_path / "corpus").mkdir()
    for shard in range(2):
        table = pa.table(
            {
                "corpus_id": pa.array([shard * 10], pa.int64()),
                "image": pa.array([{"bytes": encoded(images[shard])}], image_type),
                "doc_id": ["Report"],
                "markdown": ["text"],
                "page_number_in_doc": pa.array([shard], pa.int64()),
            }
        )
        pq.write_table(table, tmp_path / "corpus" / f"test-{shard:05d}-of-00002.parquet")
    tables = {
        "queries": {"query_id": [7], "query": ["what"], "language": ["english"]},
        "qrels": {"query_id": [7, 7], "corpus_id": [10, 0], "score": [2, 0]},
    }
    for config, columns in tables.items():
        (tmp_path / config).mkdir()
        pq.write_table(pa.table(columns), tmp_path / config / "test-00000-of-00001.parquet")
    dataset = load_dataset(str(tmp_path), "test")
    assert dataset.corpus.ids == ["0", "10"]
    assert dataset.qrels == {"7": {"10": 2, "0": 0}}
    assert dataset.corpus.documents == ["Report", "Report"]
    assert dataset.corpus.pages == [0, 1]
    np.testing.assert_array_equal(dataset.corpus.image(1), images[1])


def test_files_are_found_where_the_readme_says(folder):
    (folder / "corpus" / "test-00000-of-00001.parquet").rename(folder / "pages.parquet")
    readme = folder / "README.md"
    readme.write_text(
        readme.read_text().replace(
            "path: corpus/test-00000-of-00001.parquet", "path: page*.parquet"
        )
    )
    assert len(load_dataset(folder, "test").corpus) == 3


def test_rows_without_document_or_page_are_pages_of_their_own(folder):
    rewrite(folder, "corpus", lambda table: table.select(["corpus-id", "image"]))
    rewrite(folder, "queries", lambda table: table.select(["query-id", "query"]))
    dataset = load_dataset(folder, "test")
    assert dataset.corpus.documents == dataset.corpus.ids
    assert len(set(dataset.corpus.pages)) == 3
    assert all(page < 0 for page in dataset.corpus.pages)
    assert dataset.corpus.page_keys.tolist() == [0, 1, 2]
    assert dataset.queries[0] == Query("q1", "Über uns", "", None)


def test_rows_of_one_page_share_its_key(folder):
    rewrite(folder, "corpus", lambda t: t.set_column(3, "page-number", pa.array([4, 4, 4])))
    assert load_dataset(folder, "test").corpus.page_keys.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("config", "column"),
    [
        ("corpus", "corpus-id"),
        ("corpus", "image"),
        ("queries", "query-id"),
        ("queries", "query"),
        ("qrels", "query-id"),
        ("qrels", "corpus-id"),
        ("qrels", "score"),
    ],
)
def test_a_missing_column_is_named_with_its_file_and_what_was_found(folder, config, column):
    def rename(table):
        names = ["other" if name == column else name for name in table.column_names]
        return table.rename_columns(names)

    rewrite(folder, config, rename)
    expected = rf"{config}/test-.*column '{column}' is missing; columns found: .*other"
    with pytest.raises(DatasetError, match=expected):
        load_dataset(folder, "test")


def test_a_column_of_the_wrong_type_is_named(folder):
    scores = pa.array([0.5, 1.0, 1.0, 1.0])
    rewrite(folder, "qrels", lambda table: table.set_column(2, "score", scores))
    with pytest.raises(DatasetError, match=r"column 'score' is of type double"):
        load_dataset(folder, "test")


def test_a_damaged_file_is_named(folder):
    path = folder / "queries" / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"queries/test-.*cannot be read as Parquet"):
        load_dataset(folder, "test")


def test_an_unknown_split_is_answered_with_those_that_exist(folder):
    with pytest.raises(DatasetError, match=r"no split 'dev'.*splits found: test"):
        load_dataset(folder, "dev")


def test_a_missing_validation_split_comes_with_the_way_to_do_without(folder):
    hint = r"splits found: test; set validation.split=null in the recipe to train without one"
    with pytest.raises(DatasetError, match=hint):
        load_dataset(folder, "validation")
    with pytest.raises(DatasetError) as error:
        load_dataset(folder, "dev")
    assert "validation.split" not in str(error.value)


def test_ids_must_be_unique(folder):
    rewrite(folder, "corpus", lambda table: pa.concat_tables([table, table.slice(1, 1)]))
    with pytest.raises(DatasetError, match=r"corpus-id must be unique, but 'a.pdf#p3-w1' occurs"):
        load_dataset(folder, "test")


def test_queries_without_a_positive_are_named_and_counted(folder):
    def to_negative(table):
        return table.set_column(2, "score", pa.array([0, 1, 0, 0], pa.int64()))

    rewrite(folder, "qrels", to_negative)
    with pytest.raises(DatasetError, match=r"2 of 3 have none: 'q2', 'q3'"):
        load_dataset(folder, "test")


def test_judgements_that_contradict_each_other_are_refused(folder):
    def contradict(table):
        scores = table.column("score").to_pylist()
        doubled = pa.concat_tables([table, table])
        return doubled.set_column(2, "score", pa.array([*scores, scores[0] + 1, *scores[1:]]))

    rewrite(folder, "qrels", contradict)
    with pytest.raises(DatasetError, match=r"different scores for the same image to query 'q1'"):
        load_dataset(folder, "test")


@pytest.mark.parametrize(("column", "place"), [("query-id", 0), ("corpus-id", 1)])
def test_judgements_of_unknown_ids_are_named(folder, column, place):
    def change(table):
        values = ["ghost", *table.column(column).to_pylist()[1:]]
        return table.set_column(place, column, pa.array(values))

    rewrite(folder, "qrels", change)
    with pytest.raises(DatasetError, match=f"qrels name the {column} 'ghost'"):
        load_dataset(folder, "test")


@pytest.mark.parametrize(
    ("config", "named"), [("corpus", "the corpus"), ("queries", "the queries")]
)
def test_an_empty_table_is_refused(folder, config, named):
    rewrite(folder, config, lambda table: table.slice(0, 0))
    with pytest.raises(DatasetError, match=f"{named} has no rows|{named} have no rows"):
        load_dataset(folder, "test")


def test_an_empty_query_text_is_refused(folder):
    rewrite(folder, "queries", lambda t: t.set_column(1, "query", pa.array(["a", " \n", "b"])))
    with pytest.raises(DatasetError, match=r"text of query 'q2' is empty"):
        load_dataset(folder, "test")


OUTSIDE = ["../secret.png", "a/../../secret.png", "/etc/passwd", r"C:\secret.png", r"..\secret.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_image_path_outside_the_folder_is_refused(folder, name):
    image = pa.array([{"bytes": None, "path": name}] * 3)
    rewrite(folder, "corpus", lambda table: table.set_column(1, "image", image))
    with pytest.raises(DatasetError, match=r"lies outside the dataset folder"):
        load_dataset(folder, "test")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_document_outside_the_folder_is_refused(folder, name):
    documents = pa.array(["a.pdf", name, "b.pdf"])
    rewrite(folder, "corpus", lambda table: table.set_column(2, "doc-id", documents))
    with pytest.raises(DatasetError, match=r"lies outside the dataset folder"):
        load_dataset(folder, "test")


def test_a_path_beside_stored_bytes_is_a_mere_name(folder, images):
    image = pa.array([{"bytes": encoded(each), "path": "/home/someone/1.png"} for each in images])
    rewrite(folder, "corpus", lambda table: table.set_column(1, "image", image))
    np.testing.assert_array_equal(load_dataset(folder, "test").corpus.image(2), images[2])


def test_images_may_lie_beside_the_tables(folder, images):
    (folder / "images").mkdir()
    for name, image in zip("xyz", images, strict=True):
        (folder / "images" / f"{name}.jpg").write_bytes(encoded(image, "JPEG"))
    image = pa.array([{"bytes": None, "path": f"images/{n}.jpg"} for n in "xyz"])
    rewrite(folder, "corpus", lambda table: table.set_column(1, "image", image))
    corpus = load_dataset(folder, "test").corpus
    for row, image in enumerate(images):
        assert corpus.image_size(row) == corpus.image(row).shape[:2] == image.shape[:2]
        assert corpus.encoded(row) == (folder / "images" / f"{'xyz'[row]}.jpg").read_bytes()


def test_a_missing_image_file_is_named_with_its_dataset(folder, images):
    (folder / "x.png").write_bytes(encoded(images[0]))
    image = pa.array([{"bytes": None, "path": f"{n}.png"} for n in "xyz"])
    rewrite(folder, "corpus", lambda table: table.set_column(1, "image", image))
    with pytest.raises(
        DatasetError, match=r"set, split 'test': .*'y.png', 'z.png', but these are not files"
    ):
        load_dataset(folder, "test")


def test_a_row_without_image_is_named(folder):
    image = pa.array([{"bytes": b"x", "path": ""}, {"bytes": None, "path": None}, None])
    rewrite(folder, "corpus", lambda table: table.set_column(1, "image", image))
    with pytest.raises(DatasetError, match=r"'a.pdf#p3-w1', 'b/c.pdf#p1' have neither"):
        load_dataset(folder, "test")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_is_that_of_the_decoded_image(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if kind in ("GIF", "BMP") else {"exif": exif}
    image = encoded(np.zeros((30, 50, 3), np.uint8), kind, **options)
    write_split(tmp_path, "test", [CorpusRow("a", image, "a")], [Query("q", "q")], {"q": {"a": 1}})
    corpus = load_dataset(tmp_path, "test").corpus
    assert corpus.image_size(0) == corpus.image(0).shape[:2]
    if options:
        assert corpus.image_size(0) == ((30, 50) if orientation == 1 else (50, 30))


def test_the_fingerprint_knows_the_content_and_nothing_else(folder, rows):
    before = load_dataset(folder, "test").fingerprint
    for config in ("corpus", "queries", "qrels"):
        path = folder / config / "test-00000-of-00001.parquet"
        pq.write_table(pq.read_table(path), path, row_group_size=2, compression="GZIP")
    assert load_dataset(folder, "test").fingerprint == before
    changes = {
        "corpus": ("kind", 5, ["heading", "words", "words"]),
        "queries": ("query", 1, ["Über uns", "two", "4"]),
        "qrels": ("score", 2, [1, 0, 1, 1]),
    }
    found = {before}
    for config, (name, place, values) in changes.items():
        write_split(folder, "test", rows, QUERIES, QRELS)
        rewrite(
            folder, config, lambda t, n=name, p=place, v=values: t.set_column(p, n, pa.array(v))
        )
        found.add(load_dataset(folder, "test").fingerprint)
    image = rows[0].image + b"\0"
    changed = [CorpusRow(rows[0].id, image, "a.pdf", 0, rows[0].box, "heading"), *rows[1:]]
    write_split(folder, "test", changed, QUERIES, QRELS)
    assert load_dataset(folder, "test").fingerprint not in found
    assert len(found) == 4


def test_moving_bytes_between_neighbours_changes_the_fingerprint(tmp_path):
    found = set()
    for texts in (["ab", "c"], ["a", "bc"]):
        queries = [Query(f"q{row}", text) for row, text in enumerate(texts)]
        corpus = [CorpusRow("a", b"x", "a")]
        write_split(tmp_path, "test", corpus, queries, {"q0": {"a": 1}, "q1": {"a": 1}})
        found.add(load_dataset(tmp_path, "test").fingerprint)
    assert len(found) == 2


def test_without_a_network_the_hub_is_reported_and_not_called(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    called = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: called.append(args))
    with pytest.raises(DatasetError, match=r"someone/something: .*cannot reach the hub"):
        load_dataset("someone/something", "test")
    assert called == []


def test_a_dataset_of_the_hub_is_read_from_its_snapshot(folder, monkeypatch):
    asked = []

    def snapshot_download(repository, **options):
        asked.append((repository, options["repo_type"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    dataset = load_dataset("someone/something", "test")
    assert dataset.name == "someone/something"
    assert asked == [("someone/something", "dataset")]


@pytest.mark.parametrize("source", ["no-such-folder", "a/b/c", "set.csv"])
def test_what_is_neither_a_path_nor_a_hub_id_is_named(source):
    with pytest.raises(DatasetError, match=f"{source}: there is no such folder or file"):
        load_dataset(source, "test")


def test_features_are_declared_for_the_hub_viewer(folder):
    schema = pq.read_schema(folder / "corpus" / "test-00000-of-00001.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}


def test_loading_a_dataset_decodes_no_image_and_looks_for_no_file_of_one(folder, monkeypatch):
    asked = []
    is_file = Path.is_file
    monkeypatch.setattr(Image, "open", lambda *args, **_: asked.append(args))
    monkeypatch.setattr(
        Path, "is_file", lambda path: asked.append(path) if path.suffix == ".png" else is_file(path)
    )
    image = pa.array([{"bytes": b"x", "path": f"{n}.png"} for n in "xyz"])
    rewrite(folder, "corpus", lambda table: table.set_column(1, "image", image))
    assert len(load_dataset(folder, "test").corpus) == 3
    assert asked == []
