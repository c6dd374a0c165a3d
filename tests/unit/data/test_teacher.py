"""Teacher scores: what is written is read, and what cannot be followed is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colfolio.data.dataset import CorpusRow, Query, load_dataset, splits_of, write_split
from colfolio.data.teacher import TeacherScores
from colfolio.errors import DatasetError

TEACHER = {"q1": {"c": 0.5, "a": -3.25}, "q0": {"a": 2.0, "b": 1.0, "c": 0.125}}


@pytest.fixture
def write(tmp_path):
    def write(teacher=None, split="train"):
        rows = [CorpusRow(name, b"!", name) for name in "abc"]
        queries = [Query("q0", "one"), Query("q1", "two")]
        qrels = {"q0": {"a": 1}, "q1": {"b": 1}}
        write_split(tmp_path / "set", split, rows, queries, qrels, teacher)
        return tmp_path / "set"

    return write


def replaced(folder, **columns):
    """Write other teacher scores into the table of the split."""
    types = {"query-id": pa.string(), "corpus-id": pa.string(), "score": pa.float64()}
    given = {"query-id": ["q0", "q0"], "corpus-id": ["a", "b"], "score": [1.0, 2.0]} | columns
    arrays = {name: pa.array(values, types[name]) for name, values in given.items()}
    pq.write_table(pa.table(arrays), folder / "teacher" / "train-00000-of-00001.parquet")


def test_teacher_scores_are_read_as_written(write):
    assert load_dataset(write(TEACHER), "train").teacher == TEACHER


def test_a_split_without_them_has_none(write):
    folder = write()
    assert load_dataset(folder, "train").teacher is None
    assert not (folder / "teacher").exists()
    assert "teacher" not in (folder / "README.md").read_text()


def test_they_are_no_reason_for_a_split_to_exist_or_not(write):
    write(TEACHER)
    folder = write(None, "test")
    assert splits_of(folder) == ["train", "test"]
    assert load_dataset(folder, "train").teacher == TEACHER
    assert load_dataset(folder, "test").teacher is None


def test_a_split_that_is_written_again_loses_the_scores_of_its_old_images(write):
    write(TEACHER)
    folder = write()
    assert load_dataset(folder, "train").teacher is None
    assert "teacher" not in (folder / "README.md").read_text()


def test_datasets_loads_them(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    options = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    table = datasets.load_dataset(str(write(TEACHER)), "teacher", **options)
    assert table[1] == {"query-id": "q1", "corpus-id": "a", "score": -3.25}


def test_the_fingerprint_knows_them(write):
    found = {load_dataset(write(), "train").fingerprint}
    found.add(load_dataset(write(TEACHER), "train").fingerprint)
    found.add(load_dataset(write(TEACHER | {"q1": {"c": 0.5, "a": -3.5}}), "train").fingerprint)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query-id": ["q0", "q7"]}, r"teacher scores name the query-id 'q7'"),
        ({"corpus-id": ["a", "z"]}, r"teacher scores name the corpus-id 'z'"),
        ({"corpus-id": ["a", "a"]}, r"scores the same image more than once for query 'q0'"),
        ({"score": [1.0, float("nan")]}, r"1 of 2 teacher scores are not finite, .* query 'q0'"),
        ({"score": [1.0, float("inf")]}, r"1 of 2 teacher scores are not finite"),
        ({"score": [1.0, 1e300]}, r"1 of 2 teacher scores are not finite"),
        ({"score": [1.0, None]}, r"teacher scores: score is missing in 1 of 2 rows"),
    ],
)
def test_scores_that_do_not_fit_are_refused(write, columns, message):
    folder = write(TEACHER)
    replaced(folder, **columns)
    with pytest.raises(DatasetError, match=message):
        load_dataset(folder, "train")


def test_a_matrix_has_each_score_in_its_place_and_nan_elsewhere(write):
    dataset = load_dataset(write(TEACHER), "train")
    found = TeacherScores(dataset).between([1, 0, 1], np.array([2, 1, 0]))
    nan = np.nan
    np.testing.assert_array_equal(found, [[0.5, nan, -3.25], [0.125, 1, 2], [0.5, nan, -3.25]])
    assert found.dtype == np.float32
    assert [rows.tolist() for rows in TeacherScores(dataset).rows] == [[0, 1, 2], [0, 2]]


def test_a_matrix_equals_its_plain_definition_on_many_scores(tmp_path):
    generator = np.random.default_rng(1)
    names = [f"c{n}" for n in range(30)]
    order = {f"q{n}": generator.permutation(30)[: generator.integers(2, 30)] for n in range(9)}
    teacher = {q: {names[row]: float(np.float32(row / 7)) for row in order[q]} for q in order}
    rows = [CorpusRow(name, b"!", name) for name in names]
    queries = [Query(name, name) for name in order]
    qrels = {name: {"c0": 1} for name in order}
    write_split(tmp_path, "train", rows, queries, qrels, teacher)
    asked, columns = generator.integers(0, 9, 5), generator.permutation(30)[:12]
    found = TeacherScores(load_dataset(tmp_path, "train")).between(asked.tolist(), columns)
    for line, query in zip(found, asked, strict=True):
        plain = [teacher[f"q{query}"].get(names[row], np.nan) for row in columns]
        np.testing.assert_array_equal(line, np.array(plain, np.float32))


def test_distillation_needs_a_teacher(write):
    with pytest.raises(DatasetError, match=r"add a table 'teacher' .* a split 'train'"):
        TeacherScores(load_dataset(write(), "train"))


def test_distillation_needs_two_scores_of_each_query(write):
    dataset = load_dataset(write({"q0": {"a": 1.0, "b": 0.0}, "q1": {"a": 1.0}}), "train")
    with pytest.raises(DatasetError, match=r"fewer for 1 of 2 queries, such as 'q1'"):
        TeacherScores(dataset)
