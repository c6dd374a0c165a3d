import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def paths_in_the_file_map():
    """Paths of the README's file map: a line names a file or folder, indented below its folder."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(
        r"^#+ [^\n]*file map[^\n]*\n.*?^```[^\n]*\n(.*?)^```", readme, re.I | re.M | re.S
    )
    assert found, "README.md has no fenced block behind a heading with 'File map'"
    paths, parents = [], []
    for line in found[1].splitlines():
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        # several names may share a line, each followed by two spaces or its words
        first = line.split()[0]
        while parents and parents[-1][0] >= depth:
            parents.pop()
        path = "".join(folder for _, folder in parents) + first
        paths.append(path)
        if first.endswith("/"):
            parents.append((depth, first))
    return paths


def test_every_path_of_the_file_map_exists():
    paths = paths_in_the_file_map()
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
