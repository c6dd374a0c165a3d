"""The folder works where only torch is installed, and the examples in its docstrings hold."""

import ast
import doctest
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from colfolio import mrope

FOLDER = Path(mrope.__file__).parent
MODULES = sorted(module.name for module in pkgutil.iter_modules(mrope.__path__))
# what torch has loaded by itself may be loaded again; nothing else beside the standard library may
ALONE = """
import sys
import torch

class Refusal:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"refused: {name}", name=name)

allowed = {name.partition(".")[0] for name in sys.modules} | {"mrope_copy"}
assert not allowed & {"colfolio", "transformers", "jaxtyping", "beartype"}, allowed
sys.path.insert(0, sys.argv[1])
sys.meta_path.insert(0, Refusal())
import importlib
import mrope_copy
from mrope_copy import cos_sin, inverse_frequencies, padded_position_ids, rotate, scheme_of

for name in sys.argv[2:]:
    importlib.import_module(f"mrope_copy.{name}")
types = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 0]])
grids = torch.tensor([[1, 4, 2]]), torch.tensor([[3, 2, 2]])
positions = padded_position_ids(types, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), *grids)
scheme = scheme_of("qwen2_vl")
angles = cos_sin(positions, inverse_frequencies(16), scheme.axes(scheme.sections(8)))
queries = torch.randn(2, 3, 4, 16, requires_grad=True)
rotate(queries, queries, *angles)[0].sum().backward()
assert queries.grad.isfinite().all()
assert not {"colfolio", "transformers"} & set(sys.modules)
try:
    import transformers
except ModuleNotFoundError as error:
    assert "refused" in str(error)
    print(positions.tolist())
"""


def test_a_copy_of_the_folder_runs_where_only_torch_can_be_imported(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "mrope_copy", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path), *MODULES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(
        [
            [[0, 0, 1, 1], [0, 1, 2, 1]],
            [[0, 0, 1, 2], [0, 0, 0, 1]],
            [[0, 0, 1, 1], [0, 0, 0, 1]],
        ]
    )


@pytest.mark.parametrize("module", [*MODULES, "__init__"])
def test_modules_import_torch_the_standard_library_and_one_another(module):
    # also imports inside functions, which importing a module does not reach
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            # a second dot would leave the folder
            assert node.level == 1, node.lineno
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.partition(".")[0]
            assert top == "torch" or top in sys.stdlib_module_names, f"line {node.lineno}: {name}"


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_hold(module):
    text = (FOLDER / f"{module}.py").read_text(encoding="utf-8")
    loaded = importlib.import_module(f"colfolio.mrope.{module}")
    found = sum(len(test.examples) for test in doctest.DocTestFinder().find(loaded))
    # an example that is not found proves nothing
    assert found == len(re.findall(r"^ *>>> ", text, re.MULTILINE))
    assert doctest.testmod(loaded).failed == 0
