import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^#+ [^\n]*file map[^\n]*\n.*?^```[^\n]*\n(.*?)^```", re.I | re.M | re.S)
_MODULE = re.compile(r"[\w./-]*\w\.py")


def paths_of(readme):
    """Paths that a README's file map names, relative to its root.

    The map is the fenced block behind a heading with "File map". A line begins with a path; one
    that ends in "/" is the folder of the deeper indented lines. Modules that stand further right
    in a line are in the folder of the line.
    """
    found = _BLOCK.search(readme)
    assert found, "README.md has no fenced block behind a heading with 'File map'"
    paths, parents = [], []
    for line in found[1].splitlines():
        text = line.lstrip(" │├└─")
        if not text:
            continue
        depth = len(line) - len(text)
        while parents and parents[-1][0] >= depth:
            parents.pop()
        folder = "".join(name for _, name in parents)
        first, *others = (word.strip(",;:()") for word in text.split())
        paths.append(folder + first)
        if first.endswith("/"):
            parents.append((depth, first))
            folder += first
        paths += [folder + word for word in others if _MODULE.fullmatch(word)]
    return paths


def test_every_path_of_the_file_map_exists():
    paths = paths_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_a_file_map_is_read_as_it_is_written():
    readme = """# A
## The file map
Words.
```
a/
  b.py    what it does, with c.txt
  d/      e.py, f.py
    g.py  more
Makefile  make
```
"""
    paths = ["a/", "a/b.py", "a/d/", "a/d/e.py", "a/d/f.py", "a/d/g.py", "Makefile"]
    assert paths_of(readme) == paths


@pytest.mark.parametrize("readme", ["", "## File map\n", "```\na\n```\n## File map\n"])
def test_a_readme_without_a_file_map_fails(readme):
    with pytest.raises(AssertionError, match="no fenced block"):
        paths_of(readme)
