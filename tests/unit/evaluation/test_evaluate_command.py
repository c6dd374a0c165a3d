import json

import pytest

from colfolio.commands import evaluate as command
from colfolio.errors import ColfolioError, DatasetError
from colfolio.search.layout import MANIFEST

from .conftest import WidthEncoder


@pytest.fixture
def printed(monkeypatch):
    """A console that keeps what is printed, and a model that needs no files."""
    from rich.console import Console

    recorded = Console(record=True, width=120, force_terminal=False)
    monkeypatch.setattr(command, "console", lambda: recorded)
    monkeypatch.setattr(command, "_load_model", lambda _source: WidthEncoder())
    return recorded


def test_a_model_is_printed_beside_chance_baseline_and_unseen_titles(strips_folder, printed):
    evaluation = command.evaluate_command("a/model", strips_folder)
    text = printed.export_text()
    assert evaluation.metric("ndcg@5").value == 1.0
    assert "strips, test: 4 queries, 2 unseen titles, 4 candidates" in text
    for word in ("metric", "95 % interval", "chance", "baseline", "unseen titles", "ndcg@5", "mrr"):
        assert word in text
    assert "0.2500" in text
    assert "collapsed" not in text


def test_a_collapsed_model_is_said_to_be_collapsed(strips_folder, printed, monkeypatch):
    monkeypatch.setattr(command, "_load_model", lambda _source: WidthEncoder(is_blind=True))
    command.evaluate_command("a/model", strips_folder)
    assert "the model has collapsed: 100% of the wrong candidates" in printed.export_text()


def test_the_numbers_are_written_as_json(strips_folder, printed, tmp_path):
    out = tmp_path / "new" / "numbers.json"
    evaluation = command.evaluate_command("a/model", strips_folder, out_json=out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(evaluation.as_json()))
    assert [path.name for path in out.parent.iterdir()] == ["numbers.json"]


def test_json_that_cannot_be_written_is_an_error_that_names_the_file(
    strips_folder, printed, tmp_path
):
    (tmp_path / "file").write_text("")
    with pytest.raises(ColfolioError, match=r"numbers.json: cannot be written"):
        command.evaluate_command(
            "a/model", strips_folder, out_json=tmp_path / "file" / "numbers.json"
        )


def test_the_baseline_is_fitted_on_another_split(strips_folder, printed):
    assert command._fitted_line(strips_folder, "test").slope == pytest.approx(10.0)
    assert command._fitted_line(strips_folder, "train") is None


def test_options_of_an_index_are_refused_for_a_model(strips_folder, printed):
    with pytest.raises(ColfolioError, match="options of an index, and this is none"):
        command.evaluate_command("a/model", strips_folder, page_score="best")


def test_an_unknown_page_score_is_refused(strips_folder, printed, tmp_path):
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ColfolioError, match="page_score must be best or union, not 'mean'"):
        command.evaluate_command(tmp_path, strips_folder, page_score="mean")


def test_an_unknown_split_is_an_error(strips_folder, printed):
    with pytest.raises(DatasetError, match="validation"):
        command.evaluate_command("a/model", strips_folder, "validation")
