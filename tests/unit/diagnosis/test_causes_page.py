"""The page on diagnosis explains every cause that there is."""

import re
from pathlib import Path

from colfolio.diagnosis import causes

ROOT = Path(__file__).parents[3]
_NAMED = re.compile(r'(?:Finding|RuledOut)\(\s*"([a-z_]+)"')
_BRANCH = re.compile(r'"([a-z]+(?:_[a-z]+)+)" if |else "([a-z]+(?:_[a-z]+)+)",')


def test_every_cause_stands_in_the_table_of_the_page():
    page = (ROOT / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`([a-z_]+)`", page))
    named = {causes.HEALTHY, causes.UNKNOWN}
    for module in Path(causes.__file__).parent.glob("*_causes.py"):
        text = module.read_text(encoding="utf-8")
        named |= set(_NAMED.findall(text))
        named |= {name for pair in _BRANCH.findall(text) for name in pair if name}
    assert len(named) > 20
    assert named - {"positions"} <= explained, named - explained
