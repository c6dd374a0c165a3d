import json

import pytest
import torch

from colfolio.commands import evaluate as command
from colfolio.errors import ColfolioError, DatasetError, IndexStoreError
from colfolio.search.layout import FORMAT, MANIFEST

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


def test_an_unknown_page_score_is_refused(strips_folder, tmp_path, monkeypatch, make_retriever):
    monkeypatch.setattr(command, "load_encoder", lambda _index, _model: make_retriever())
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ColfolioError, match="page_score must be best or union, not 'mean'"):
        command.evaluate_command(tmp_path, strips_folder, page_score="mean")


def test_an_index_whose_model_moved_says_how_to_name_it(strips_folder, tmp_path):
    manifest = {
        "generation": "generation-0",
        "model": str(tmp_path / "gone"),
        "fingerprint": "f",
        "dim": 2,
        "dtype": "float32",
        "views": "page",
    } | dict.fromkeys(("num_documents", "num_pages", "num_views", "num_vectors", "checksum"), 0)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"format": FORMAT}))
    with pytest.raises(IndexStoreError, match=r"gone\) cannot be loaded; .*--model"):
        command.evaluate_command(tmp_path, strips_folder)


@pytest.mark.parametrize(("precision", "is_bf16"), [("fp32", False), ("bf16", True)])
def test_a_model_is_scored_in_the_wished_precision(
    strips_folder, printed, monkeypatch, precision, is_bf16
):
    seen = []

    class Watching(WidthEncoder):
        def encode_documents(self, documents):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().encode_documents(documents)

    monkeypatch.setattr(command, "_load_model", lambda _source: Watching())
    command.evaluate_command("a/model", strips_folder, precision=precision)
    assert seen == [is_bf16]


def test_names_with_markup_are_printed_as_they_are(strips_folder, printed):
    odd = strips_folder.rename(strips_folder.with_name("strips [bold]"))
    command.evaluate_command("a/model", odd)
    assert "strips [bold], test: 4 queries" in printed.export_text()


def test_an_unknown_split_is_an_error(strips_folder, printed):
    with pytest.raises(DatasetError, match="validation"):
        command.evaluate_command("a/model", strips_folder, "validation")
