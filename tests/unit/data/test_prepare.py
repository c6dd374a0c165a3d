"""Documents to a dataset: no leak between splits, nothing half-written, the same every time."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from colfolio.commands.prepare import prepare_command
from colfolio.config import validated
from colfolio.data.dataset import load_dataset, splits_of, write_split
from colfolio.data.preparing import prepare as preparing
from colfolio.data.preparing import shards
from colfolio.data.preparing.prepare import prepare
from colfolio.data.preparing.sources import PrepareSettings, assign_splits
from colfolio.data.query_text import text_key
from colfolio.errors import DatasetError, DocumentError, RecipeError

WORDS = [
    first + last
    for first in ("har", "lan", "mead", "copp", "vo", "gra", "whis", "ket")
    for last in ("bour", "tern", "ow", "yage", "nite", "per")
]
FAMILIES = [f"family{number:02d}" for number in range(9)]
SPLIT_OF = assign_splits(FAMILIES, PrepareSettings())
TABLES = [
    f"{config}/{split}-00000-of-00001.parquet"
    for config in ("corpus", "queries", "qrels")
    for split in ("train", "validation", "test")
]


def settings(**values):
    return validated(
        {"view": "strip", "processes": 1, "strips": {"strips_per_page": 6}} | values,
        PrepareSettings,
        "",
    )


def some_family(split, place=0):
    return [family for family in FAMILIES if SPLIT_OF[family] == split][place]


@pytest.fixture
def write_document(tmp_path, make_pdf, page):
    """Writes a PDF whose pages have a title, in the outline too, and lines of words."""

    def write(name, titles, seed=0, font="F1", left=72, outline=True, lines=6, size=18):
        generator = np.random.default_rng(seed)
        pages = []
        for title in titles:
            body = [
                (left, 140 + 24 * line, 12, " ".join(generator.choice(WORDS, 6)))
                for line in range(lines)
            ]
            pages.append(page([(left, 90, size, title), *body], font=font))
        entries = [(title, number, 70) for number, title in enumerate(titles)] if outline else []
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        return make_pdf(*pages, outline=entries, name=f"docs/{name}")

    return write


@pytest.fixture
def docs(tmp_path, write_document):
    """Nine families of one manual, two pages each, all titles different."""
    generator = np.random.default_rng(7)
    titles = [
        " ".join(pair).capitalize() for pair in generator.permutation(WORDS)[:36].reshape(18, 2)
    ]
    for number, family in enumerate(FAMILIES):
        write_document(f"{family}/manual.pdf", titles[2 * number : 2 * number + 2], seed=number)
    return tmp_path / "docs"


def bytes_of(out):
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and ".cache" not in path.parts
    }


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_every_split_holds_the_headings_of_its_families(docs, out):
    report = prepare(docs, out, settings())
    assert (report.documents, report.families, report.pages) == (9, 9, 18)
    assert (report.entries, report.located) == (18, 18)
    assert splits_of(out) == ["train", "validation", "test"]
    for split in splits_of(out):
        dataset = load_dataset(out, split)
        families = {name.split("/")[0] for name in dataset.corpus.documents}
        assert families == {family for family in FAMILIES if SPLIT_OF[family] == split}
        headings = [query for query in dataset.queries if query.kind == "heading"]
        assert len(headings) == 2 * len(families) == report.splits[split].headings
        assert ("words" in dataset.corpus.kinds) == (split == "train")
        for query in headings:
            found = [id_ for id_ in dataset.positives(query.id) if "-h" in id_]
            (row,) = map(dataset.corpus.ids.index, found)
            assert re.fullmatch(r"family\d\d/manual.pdf#p[12]-h1", dataset.corpus.ids[row])
            assert dataset.corpus.image(row).shape[0] == 28
            assert dataset.corpus.image(row).min() < 100
            left, top, right, bottom = dataset.corpus.boxes[row]
            assert 0.1 < left < right < 0.9
            assert 0.08 < top < bottom < 0.13


def test_titles_and_crops_belong_together(docs, out):
    """The image of a heading is what the strip at its box on its page looks like."""
    from colfolio.data.documents import open_document
    from colfolio.data.pages.views import strip_image

    prepare(docs, out, settings(splits=["test"]))
    corpus = load_dataset(out, "test").corpus
    for row in range(len(corpus)):
        with open_document(docs / corpus.documents[row]) as document:
            page = document.render_grey(corpus.pages[row], dpi=144.0)
        strip = strip_image(page, corpus.boxes[row])
        difference = np.abs(strip.astype(int) - corpus.image(row))
        assert difference.mean() < 2


def test_pages_are_rows_of_the_page_view_with_the_same_splits(docs, out, write_document):
    write_document(f"{FAMILIES[0]}/untitled.pdf", ["Nothing here"], outline=False)
    report = prepare(docs, out, settings(view="page", page_dpi=50))
    for split in splits_of(out):
        dataset = load_dataset(out, split)
        assert {SPLIT_OF[name.split("/")[0]] for name in dataset.corpus.documents} == {split}
        assert set(dataset.corpus.kinds) == {"page"}
        assert {query.kind for query in dataset.queries} == {"heading"}
        assert dataset.corpus.image(0).shape == (550, 425, 3)
        assert dataset.corpus.boxes == [None] * len(dataset.corpus)
        for query in dataset.queries:
            assert all(
                re.fullmatch(r".*manual.pdf#p\d", id_) for id_ in dataset.positives(query.id)
            )
    home = SPLIT_OF[FAMILIES[0]]
    assert f"{FAMILIES[0]}/untitled.pdf#p1" in load_dataset(out, home).corpus.ids
    assert report.strips == 0
    assert report.located == 18


def test_pages_may_be_stored_as_jpeg(docs, out):
    prepare(docs, out, settings(view="page", page_dpi=50, page_format="jpeg", splits=["test"]))
    assert load_dataset(out, "test").corpus.encoded(0).startswith(b"\xff\xd8")


def test_equal_texts_are_one_query_with_every_crop(docs, out, write_document):
    home = some_family("test")
    write_document(f"{home}/a.pdf", ["2.1 Shared Title", "Alone"], font="F2", left=90)
    write_document(f"{home}/b.pdf", ["shared  title"], font="F3")
    prepare(docs, out, settings())
    dataset = load_dataset(out, "test")
    (query,) = [each for each in dataset.queries if text_key(each.text) == "shared title"]
    found = sorted(dataset.positives(query.id))
    assert found == [f"{home}/a.pdf#p1-h1", f"{home}/b.pdf#p1-h1"]


def test_equal_images_of_a_split_are_one_row(docs, out, write_document):
    home = some_family("test")
    write_document(f"{home}/a.pdf", ["Shared Title", "Only in a"], seed=50)
    write_document(f"{home}/b.pdf", ["Shared Title", "Only in b"], seed=51)
    report = prepare(docs, out, settings())
    dataset = load_dataset(out, "test")
    assert report.merged == 1
    assert f"{home}/a.pdf#p1-h1" in dataset.corpus.ids
    assert f"{home}/b.pdf#p1-h1" not in dataset.corpus.ids
    (query,) = [each for each in dataset.queries if each.text == "Shared Title"]
    assert dataset.positives(query.id) == [f"{home}/a.pdf#p1-h1"]


def test_a_merged_page_answers_the_titles_of_all_its_copies(docs, out, make_pdf, page):
    same = page([(72, 90, 18, "Upper title"), (72, 300, 18, "Lower title")])
    home = some_family("test")
    make_pdf(same, outline=[("Upper title", 0, 70)], name=f"docs/{home}/a.pdf")
    make_pdf(same, outline=[("Lower title", 0, 280)], name=f"docs/{home}/b.pdf")
    report = prepare(docs, out, settings(view="page", page_dpi=50))
    assert report.merged == 1
    dataset = load_dataset(out, "test")
    answers = {query.text: dataset.positives(query.id) for query in dataset.queries}
    assert answers["Upper title"] == answers["Lower title"] == [f"{home}/a.pdf#p1"]


def test_training_images_that_stand_in_other_splits_are_removed(docs, tmp_path, write_document):
    out = tmp_path / "out"
    clean = prepare(docs, out, settings())
    assert (clean.exact_removed, clean.near_removed) == (0, 0)
    train = some_family("train")
    for split in ("validation", "test"):
        write_document(f"{some_family(split)}/x.pdf", [f"Leaking {split}"], seed=60)
    write_document(f"{train}/x.pdf", ["Leaking test"], seed=61, lines=0)
    write_document(f"{train}/y.pdf", ["Leaking validation"], seed=62, left=72.4, lines=0, size=18.3)
    report = prepare(docs, out, settings(strips={"strips_per_page": 6, "jitter": False}))
    assert report.exact_removed >= 1
    assert report.near_removed >= 1
    dataset = load_dataset(out, "train")
    assert not {f"{train}/x.pdf", f"{train}/y.pdf"} & set(dataset.corpus.documents)
    assert not [query for query in dataset.queries if "Leaking" in query.text]
    for split in ("validation", "test"):
        texts = {query.text for query in load_dataset(out, split).queries}
        assert f"Leaking {split}" in texts
    only = settings(strips={"strips_per_page": 6, "jitter": False}, splits=["train"])
    prepare(docs, tmp_path / "only", only)
    whole, alone = bytes_of(out), bytes_of(tmp_path / "only")
    assert {whole[table] == alone[table] for table in TABLES if "train" in table} == {True}
    assert splits_of(tmp_path / "only") == ["train"]


@pytest.mark.parametrize(
    ("place", "removed"), [({}, (1, 0)), ({"left": 72.4, "size": 18.3}, (0, 1))]
)
def test_validation_images_that_stand_in_the_test_split_are_removed(
    docs, out, write_document, place, removed
):
    write_document(f"{some_family('test')}/x.pdf", ["Leaking title"], seed=60)
    write_document(f"{some_family('validation')}/x.pdf", ["Leaking title"], seed=61, **place)
    report = prepare(docs, out, settings(splits=["validation", "test"]))
    assert (report.exact_removed, report.near_removed) == removed
    texts = {
        split: {query.text for query in load_dataset(out, split).queries} for split in report.splits
    }
    assert "Leaking title" in texts["test"]
    assert "Leaking title" not in texts["validation"]
    dataset = load_dataset(out, "validation")
    assert f"{some_family('validation')}/x.pdf" not in dataset.corpus.documents


def test_a_copy_of_a_test_document_is_removed_from_validation(docs, out):
    copy = docs / some_family("validation") / "copy.pdf"
    shutil.copy(docs / some_family("test") / "manual.pdf", copy)
    report = prepare(docs, out, settings(splits=["validation", "test"]))
    assert (report.exact_removed, report.near_removed) == (2, 0)
    name = copy.relative_to(docs).as_posix()
    assert name not in load_dataset(out, "validation").corpus.documents


def test_a_copy_of_a_held_out_document_is_removed_from_training(docs, out):
    held_out = docs / some_family("test") / "manual.pdf"
    copy = docs / some_family("train") / "copy.pdf"
    shutil.copy(held_out, copy)
    report = prepare(docs, out, settings())
    assert report.exact_removed == 2 + 2 * 6  # two headings, and every strip of its words
    name = copy.relative_to(docs).as_posix()
    assert name not in load_dataset(out, "train").corpus.documents
    assert report.splits["test"].corpus == 2 * report.splits["test"].families


def test_pages_nearly_equal_to_held_out_pages_are_removed(docs, out, write_document):
    write_document(f"{some_family('test')}/x.pdf", ["Edition one"], seed=60, lines=20)
    write_document(f"{some_family('train')}/x.pdf", ["Edition two"], seed=60, lines=20, left=72.3)
    report = prepare(docs, out, settings(view="page", page_dpi=72))
    dataset = load_dataset(out, "train")
    assert report.near_removed == 1
    assert f"{some_family('train')}/x.pdf#p1" not in dataset.corpus.ids
    assert "Edition two" not in {query.text for query in dataset.queries}


def test_titles_know_whether_training_asks_them_too(docs, out, write_document):
    write_document(f"{some_family('test')}/x.pdf", ["Known title", "Strange title"], font="F1")
    write_document(f"{some_family('train')}/x.pdf", ["3. KNOWN title"], font="F4", left=200)
    report = prepare(docs, out, settings())
    seen = {query.text: query.seen for query in load_dataset(out, "test").queries}
    assert seen["Known title"] is True
    assert seen["Strange title"] is False
    assert report.splits["test"].seen == sum(seen.values())
    assert {query.seen for query in load_dataset(out, "train").queries} == {None}


@pytest.mark.slow
def test_the_result_does_not_depend_on_processes(docs, tmp_path):
    prepare(docs, tmp_path / "one", settings())
    prepare(docs, tmp_path / "two", settings(processes=2))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert set(TABLES) <= set(bytes_of(tmp_path / "one"))


def counted_builds(monkeypatch):
    built = []
    original = shards.build_shard

    def build(job):
        built.append(job.path)
        return original(job)

    monkeypatch.setattr(preparing, "build_shard", build)
    return built


def test_an_interrupted_run_goes_on_where_it_stopped(docs, tmp_path, monkeypatch):
    prepare(docs, tmp_path / "whole", settings())
    out = tmp_path / "cut"

    def stop(done, total, name):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(docs, out, settings(), stop)
    assert splits_of(out) == []
    built, told = counted_builds(monkeypatch), []
    prepare(docs, out, settings(), lambda *progress: told.append(progress[:2]))
    assert len(built) == 5
    assert told == [(done, 9) for done in range(4, 10)]
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


SCRIPT = """
import sys
from pathlib import Path
from colfolio.config import validated
from colfolio.data.preparing.prepare import prepare
from colfolio.data.preparing.sources import PrepareSettings

if __name__ == "__main__":
    values = {"view": "strip", "processes": 2, "strips": {"strips_per_page": 6}}
    prepare(Path(sys.argv[1]), Path(sys.argv[2]), validated(values, PrepareSettings, ""))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(docs, tmp_path):
    prepare(docs, tmp_path / "whole", settings())
    script, out = tmp_path / "script.py", tmp_path / "killed"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, script, docs, out])
    deadline = time.monotonic() + 60
    while not list(out.glob(".cache/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(out.glob(".cache/*.parquet"))
    prepare(docs, out, settings())
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    assert not list(out.glob(".cache/*.aside"))


def test_a_half_written_shard_is_made_again(docs, out, tmp_path):
    prepare(docs, tmp_path / "whole", settings())
    prepare(docs, out, settings())
    shard = next(out.glob(".cache/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-30])
    (out / "dataset.json").unlink()
    for table in TABLES:
        (out / table).unlink()
    prepare(docs, out, settings())
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_a_second_run_has_nothing_to_do(docs, out, monkeypatch):
    first = prepare(docs, out, settings())
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}
    built = counted_builds(monkeypatch)
    assert prepare(docs, out, settings()) == first
    assert built == []
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")} == before


def test_only_what_changed_is_cut_again(docs, out, monkeypatch, write_document):
    prepare(docs, out, settings())
    built = counted_builds(monkeypatch)
    changed = write_document(f"{FAMILIES[3]}/manual.pdf", ["Another title"], seed=99)
    prepare(docs, out, settings())
    assert built == [changed]
    del built[:]
    prepare(docs, out, settings(strips={"strips_per_page": 5}))
    assert len(built) == 9
    assert len(list(out.glob(".cache/*.parquet"))) == 9  # shards that nothing uses are gone


def test_changed_code_makes_shards_anew(docs, out, monkeypatch):
    prepare(docs, out, settings())
    built = counted_builds(monkeypatch)
    monkeypatch.setattr(shards, "_code_version", lambda: "another")
    prepare(docs, out, settings())
    assert len(built) == 9


def test_splits_can_be_prepared_one_after_another(docs, tmp_path):
    prepare(docs, tmp_path / "whole", settings())
    out = tmp_path / "parts"
    alone = prepare(docs, out, settings(splits=["test"]))
    assert splits_of(out) == ["test"]
    assert alone.splits["test"].seen is None
    assert {query.seen for query in load_dataset(out, "test").queries} == {None}
    prepare(docs, out, settings(splits=["validation", "train"]))
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_splits_of_other_settings_are_not_mixed(docs, out):
    prepare(docs, out, settings())
    before = bytes_of(out)
    with pytest.raises(
        DatasetError, match="holds the splits train, validation, test, made from other"
    ):
        prepare(docs, out, settings(splits=["test"], split_seed=3))
    assert bytes_of(out) == before


def test_a_dataset_of_other_origin_is_not_overwritten(docs, out):
    from colfolio.data.dataset import CorpusRow, Query

    write_split(out, "train", [CorpusRow("a", b"a", "a")], [Query("q", "q")], {"q": {"a": 1}})
    before = bytes_of(out)
    with pytest.raises(DatasetError, match="was not made by `colfolio prepare`"):
        prepare(docs, out, settings())
    assert bytes_of(out) == before


def test_two_runs_do_not_write_one_folder(docs, out):
    with preparing._locked(out / ".cache"), pytest.raises(DatasetError, match="another prepare"):
        prepare(docs, out, settings())


@pytest.fixture
def damaged(docs, make_pdf, page):
    """Four files that cannot be read among nine that can."""
    folder = docs / some_family("train")
    whole = (folder / "manual.pdf").read_bytes()
    (folder / "cut.pdf").write_bytes(whole[: len(whole) // 20])
    (folder / "empty.pdf").write_bytes(b"")
    (folder / "no-pages.pdf").write_bytes(b"%PDF-1.7\ntrailer << >>\n%%EOF")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    return [folder / name for name in ("cut.pdf", "empty.pdf", "no-pages.pdf", "picture.png")]


def test_unreadable_files_of_a_small_set_are_an_error_that_names_them(docs, out, damaged):
    with pytest.raises(DatasetError, match=r"4 of 13 files cannot be read, more than 1%") as error:
        prepare(docs, out, settings())
    for path in damaged:
        assert f"{path.relative_to(docs).as_posix()}: " in str(error.value)
    assert "empty (0 bytes)" in str(error.value)
    assert splits_of(out) == []
    for path in damaged:
        path.unlink()
    assert prepare(docs, out, settings()).skipped == ()


def test_a_few_unreadable_files_of_many_are_skipped_and_listed(docs, out, damaged, tmp_path):
    report = prepare(docs, out, settings(max_bad_share=4 / 13))
    assert [name for name, _ in report.skipped] == [p.relative_to(docs).as_posix() for p in damaged]
    assert all(reason for _, reason in report.skipped)
    assert report.documents == 9
    for path in damaged:
        path.unlink()
    prepare(docs, tmp_path / "clean", settings())
    found, clean = bytes_of(out), bytes_of(tmp_path / "clean")
    assert {table: found[table] for table in TABLES} == {table: clean[table] for table in TABLES}


def test_a_file_that_vanishes_is_skipped(docs, out, monkeypatch):
    gone = docs / FAMILIES[0] / "gone.pdf"
    original = preparing.find_sources

    def find_and_lose(*args):
        gone.write_bytes(b"soon gone")
        sources = original(*args)
        gone.unlink()
        return sources

    monkeypatch.setattr(preparing, "find_sources", find_and_lose)
    report = prepare(docs, out, settings(max_bad_share=0.2))
    assert report.skipped == ((f"{FAMILIES[0]}/gone.pdf", "does not exist"),)


@pytest.mark.parametrize("place", ["shard", "dataset"])
def test_a_full_disk_leaves_the_old_dataset(docs, out, monkeypatch, place, write_document):
    prepare(docs, out, settings())
    before = bytes_of(out)
    write_document(f"{FAMILIES[3]}/manual.pdf", ["Another title"], seed=99)
    original = shards.pq.ParquetWriter.write_table

    def write_table(writer, table):
        if ("suffix" in table.column_names) == (place == "shard"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(writer, table)

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", write_table)
    with pytest.raises(DatasetError, match="the disk is full"):
        prepare(docs, out, settings())
    monkeypatch.undo()
    assert bytes_of(out) == before
    assert not list(out.rglob("*.aside"))
    assert not (out / ".staging").exists()
    prepare(docs, out, settings())
    assert bytes_of(out) != before


def test_documents_without_outlines_are_an_error_that_says_what_to_do(
    tmp_path, out, write_document
):
    for family in FAMILIES:
        write_document(f"{family}/plain.pdf", ["Title"], outline=False)
    with pytest.raises(DatasetError, match=r"none of the 9 documents has an outline.*CSV or JSONL"):
        prepare(tmp_path / "docs", out, settings())


def test_outlines_that_stand_nowhere_are_an_error(tmp_path, out, make_pdf, page):
    for family in FAMILIES:
        (tmp_path / "docs" / family).mkdir(parents=True)
        blank = page([(72, 90, 12, "Something else")])
        make_pdf(blank, outline=[("Missing title", 0, 70)], name=f"docs/{family}/x.pdf")
    with pytest.raises(DatasetError, match="none of the 9 outline entries stands in the text"):
        prepare(tmp_path / "docs", out, settings())


def test_a_split_without_headings_is_named(tmp_path, out, write_document):
    write_document("only/manual.pdf", ["First title", "Second title"])
    with pytest.raises(
        DatasetError, match=r"split '\w+' has no heading; its document families: none"
    ):
        prepare(tmp_path / "docs", out, settings())
    alone = {"shares": {"train": 0, "validation": 0, "test": 1}, "splits": ["test"]}
    assert prepare(tmp_path / "docs", out, settings(**alone)).splits["test"].queries == 2


def test_a_missing_folder_is_named(tmp_path, out):
    with pytest.raises(DocumentError, match="nowhere: does not exist"):
        prepare(tmp_path / "nowhere", out, settings())


def test_an_out_that_is_a_file_is_named(docs, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatasetError, match=r"file.* cannot be written"):
        prepare(docs, tmp_path / "file", settings())


def test_the_manifest_tells_the_report(docs, out):
    report = prepare(docs, out, settings())
    manifest = json.loads((out / "dataset.json").read_text())
    assert manifest["report"]["splits"]["test"]["queries"] == report.splits["test"].queries


def test_the_command_prints_what_came_of_it(docs, out, damaged, capsys):
    overrides = ["processes=1", "strips.strips_per_page=4", "max_bad_share=0.5"]
    prepare_command(docs, out, "strip", None, overrides)
    printed = capsys.readouterr().out
    assert "9 documents of 9 families, 18 pages" in printed
    assert "18 outline titles found on their pages, 0 dropped" in printed
    assert "skipped, as they cannot be read: 4" in printed
    assert f"{damaged[1].relative_to(docs).as_posix()}: is empty" in printed.replace("\n", "")
    assert os.fspath(out) in printed.replace("\n", "")


def test_the_command_prepares_single_splits(docs, out):
    prepare_command(docs, out, "page", ["test"], ["page_dpi=40", "processes=1"])
    assert splits_of(out) == ["test"]


@pytest.mark.parametrize("override", ["speed=1", "strips.speed=1", "page_dpi=low", "page_dpi"])
def test_the_command_refuses_unknown_settings(docs, out, override):
    with pytest.raises(RecipeError, match=override.partition("=")[0]):
        prepare_command(docs, out, "page", None, [override])
    assert not out.exists()
