"""The Python in a concept page runs from top to bottom, as a reader would run it."""

import re
from pathlib import Path

import pytest

PAGES = [Path(__file__).parents[2] / "docs" / name for name in ("losses.md", "mrope.md")]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, capsys):
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    exec(compile("\n".join(blocks), str(page), "exec"), {})
    capsys.readouterr()
