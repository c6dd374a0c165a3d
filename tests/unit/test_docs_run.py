"""The Python in a concept page runs from top to bottom, and its settings are settings."""

import re
from pathlib import Path

import pytest
import yaml

from colfolio.config import validated
from colfolio.training import TrainSettings

DOCS = Path(__file__).parents[2] / "docs"
_RUN = (
    "adapters.md",
    "diagnosis.md",
    "check.md",
    "encode.md",
    "formats.md",
    "losses.md",
    "mrope.md",
    "parts.md",
)
PAGES = [DOCS / name for name in _RUN]
_YAML = re.compile(r"^```yaml\n(.*?)^```", re.M | re.S)
SETTINGS = [
    (page.name, block)
    for page in sorted(DOCS.glob("*.md"))
    for block in _YAML.findall(page.read_text(encoding="utf-8"))
    if re.search(r"^train:", block, re.M)
]
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, capsys):
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    exec(compile("\n".join(blocks), str(page), "exec"), {})
    capsys.readouterr()


def test_pages_show_settings():
    assert {name for name, _ in SETTINGS} >= {"large-batches.md", "memory.md"}


@pytest.mark.parametrize(("name", "block"), SETTINGS, ids=[name for name, _ in SETTINGS])
def test_settings_on_a_page_can_be_put_in_a_recipe(name, block):
    settings = {"steps": 1} | yaml.safe_load(block)["train"]
    assert isinstance(validated(settings, TrainSettings, name), TrainSettings)
