import io

import pytest
from rich.console import Console

from colfolio.commands import prepare as command
from colfolio.errors import DocumentError


def test_the_bar_names_documents_with_markup_as_they_are(tmp_path, monkeypatch):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=160)
    monkeypatch.setattr(command, "console", lambda: terminal)

    def prepare(documents, _out, _settings, on_progress):
        on_progress(1, 2, "manual [/b].pdf")
        raise DocumentError(documents, "stopped here")

    monkeypatch.setattr(command, "prepare", prepare)
    with pytest.raises(DocumentError, match="stopped here"):
        command.prepare_command(tmp_path, tmp_path / "out", "page")
    assert "manual [/b].pdf" in shown.getvalue()
