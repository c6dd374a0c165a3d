"""Which split a document belongs to: its family decides, and nothing else."""

from collections import Counter

import pytest

from colfolio.config import validated
from colfolio.data.preparing.sources import PrepareSettings, Shares, assign_splits, find_sources
from colfolio.errors import DocumentError, RecipeError

SETTINGS = PrepareSettings(view="strip")
FAMILIES = [f"family {number}" for number in range(3000)]


def place_documents(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def test_splits_have_their_shares_of_the_families():
    counts = Counter(assign_splits(FAMILIES, SETTINGS).values())
    assert counts["train"] / 3000 == pytest.approx(0.70, abs=0.03)
    assert counts["validation"] / 3000 == pytest.approx(0.08, abs=0.015)
    assert counts["test"] / 3000 == pytest.approx(0.22, abs=0.03)


def test_shares_are_parts_of_their_sum():
    doubled = SETTINGS.model_copy(update={"shares": Shares(train=1.4, validation=0.16, test=0.44)})
    assert assign_splits(FAMILIES, doubled) == assign_splits(FAMILIES, SETTINGS)


def test_a_family_stays_in_its_split_whoever_else_comes():
    everyone = assign_splits(FAMILIES, SETTINGS)
    some = assign_splits(FAMILIES[500:100:-1], SETTINGS)
    assert some == {family: everyone[family] for family in some}


def test_another_seed_is_another_division():
    other = assign_splits(FAMILIES, SETTINGS.model_copy(update={"split_seed": 1}))
    same = sum(
        other[family] == split for family, split in assign_splits(FAMILIES, SETTINGS).items()
    )
    assert same / 3000 == pytest.approx(0.70**2 + 0.08**2 + 0.22**2, abs=0.03)


def test_few_families_fill_every_split():
    for first in range(0, 300, 3):
        split_of = assign_splits(FAMILIES[first : first + 3], SETTINGS)
        assert sorted(split_of.values()) == ["test", "train", "validation"]
        assert (
            assign_splits(FAMILIES[first + 2 : first - 1 if first else None : -1], SETTINGS)
            == split_of
        )


def test_a_share_of_zero_gets_nothing():
    shares = Shares(train=0, validation=0, test=1)
    split_of = assign_splits(FAMILIES, SETTINGS.model_copy(update={"shares": shares}))
    assert set(split_of.values()) == {"test"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shares": {"train": 0, "validation": 0, "test": 0}}, "at least one share"),
        ({"shares": {"train": -1}}, "shares.train"),
        ({"shares": {"dev": 1}}, "unknown key 'shares.dev'"),
        ({"splits": ["dev"]}, "splits.0"),
        ({"splits": []}, "splits"),
        ({"view": "tile"}, "view"),
        ({"speed": 1}, "unknown key 'speed'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(RecipeError, match=message):
        validated(values, PrepareSettings, "prepare")


def test_whole_pages_are_prepared_by_default_as_they_are_on_the_command_line():
    assert PrepareSettings().view == "page"


def test_a_family_is_the_first_folder_or_the_stem(tmp_path):
    names = ["a/one.pdf", "a/deep/two.pdf", "b/one.pdf", "c.pdf", "c.png", "d.pdf"]
    place_documents(tmp_path / "docs", names)
    sources = find_sources(tmp_path / "docs", tmp_path / "cache", SETTINGS)
    assert [source.name for source in sources] == sorted(names)
    families = {source.name: source.family for source in sources}
    assert families == {
        "a/one.pdf": "a",
        "a/deep/two.pdf": "a",
        "b/one.pdf": "b",
        "c.pdf": "c",
        "c.png": "c",
        "d.pdf": "d",
    }


def test_both_views_divide_alike_and_share_no_shard(tmp_path):
    place_documents(tmp_path / "docs", [f"{number}.pdf" for number in range(40)])
    strips = find_sources(tmp_path / "docs", tmp_path / "cache", SETTINGS)
    settings = SETTINGS.model_copy(update={"view": "page"})
    pages = find_sources(tmp_path / "docs", tmp_path / "cache", settings)
    assert [each.split for each in strips] == [each.split for each in pages]
    assert not {each.shard for each in strips} & {each.shard for each in pages}


def test_shards_are_named_by_content_and_by_what_is_cut(tmp_path):
    docs = place_documents(tmp_path / "docs", ["a.pdf", "b.pdf"])
    (docs / "b.pdf").write_bytes((docs / "a.pdf").read_bytes())
    everything = SETTINGS.model_copy(update={"shares": Shares(validation=0, test=0)})

    def shards(**changes):
        settings = everything.model_copy(update=changes)
        return [each.shard for each in find_sources(docs, tmp_path / "cache", settings)]

    first, second = shards()
    assert first == second
    assert shards(max_bad_share=0.5, processes=1, page_dpi=72.0) == [first, second]
    assert shards(view="page")[0] != first
    assert shards(view="page", page_dpi=72.0) != shards(view="page")
    fewer = SETTINGS.strips.model_copy(update={"strips_per_page": 3})
    assert shards(strips=fewer)[0] != first
    assert shards(shares=Shares(train=0, validation=0))[0] != first
    (docs / "a.pdf").write_bytes(b"changed")
    assert shards()[0] != first


def test_one_file_is_a_document_of_its_own(tmp_path):
    place_documents(tmp_path, ["a/one.pdf"])
    (source,) = find_sources(tmp_path / "a" / "one.pdf", tmp_path / "cache", SETTINGS)
    assert (source.name, source.family) == ("one.pdf", "one")


def test_a_folder_without_documents_is_named(tmp_path):
    place_documents(tmp_path, ["notes.txt"])
    with pytest.raises(DocumentError, match="holds no document"):
        find_sources(tmp_path, tmp_path / "cache", SETTINGS)
    with pytest.raises(DocumentError, match="does not exist"):
        find_sources(tmp_path / "none", tmp_path / "cache", SETTINGS)
