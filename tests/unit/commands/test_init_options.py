"""An option of `colfolio init` is honoured, or refused by its name."""

import pytest

from colfolio.commands.init import init_command
from colfolio.errors import CheckpointError, RecipeError
from colfolio.models import base


@pytest.mark.parametrize(
    ("start", "options", "words"),
    [
        ("owner/name", {"dataset": "pages"}, "--dataset teaches the tokenizer of a shape"),
        ("folder", {"dataset": "pages", "vision": "tower"}, "leave --dataset out"),
        ("shape.yaml", {"revision": "v1", "dataset": "pages"}, "--revision is of a hub id"),
        ("shape.yml", {"vision": "tower"}, "--vision is of a decoder"),
        ("shape.yaml", {"vision_revision": "v1"}, "leave --vision-revision out"),
        ("owner/name", {"vision_revision": "v1"}, "--vision-revision is of the hub id"),
        ("owner/name", {"scheme": "videorope"}, "--scheme goes onto a text decoder"),
    ],
)
def test_an_option_that_nothing_would_be_done_with_is_refused(start, options, words, tmp_path):
    with pytest.raises(RecipeError, match=words):
        init_command(start, tmp_path / "base", **options)
    assert not (tmp_path / "base").exists()


def test_decoder_and_tower_have_revisions_of_their_own(tmp_path, monkeypatch):
    asked = []

    def locate(path_or_id, revision=None):
        asked.append((path_or_id, revision))
        if len(asked) == 2:
            raise CheckpointError("asked enough")

    monkeypatch.setattr(base, "locate", locate)
    with pytest.raises(CheckpointError, match="asked enough"):
        init_command(
            *("a/decoder", tmp_path / "base"),
            revision="v1",
            vision="a/tower",
            vision_revision="v2",
        )
    assert asked == [("a/decoder", "v1"), ("a/tower", "v2")]
