"""Checkpoints of other libraries in the commands that do not name a format."""

import pytest
import yaml

from colfolio.commands.export import export_command
from colfolio.commands.plan import plan_command
from colfolio.models import Retriever
from colfolio.models.contract import hash_weights
from colfolio.models.outline import outline_of

TARGETS = ["colpali-engine", "transformers", "sentence-transformers"]
pytestmark = pytest.mark.filterwarnings("ignore::colfolio.models.formats.AssumedWarning")


@pytest.fixture
def foreign(make_retriever, tmp_path):
    """A folder of another library, without our contract."""

    def make(target):
        make_retriever(dim=128).save_pretrained(tmp_path / "base")
        export_command(str(tmp_path / "base"), target, tmp_path / "theirs")
        (tmp_path / "theirs" / "colfolio.json").unlink()
        return tmp_path / "theirs"

    return make


@pytest.mark.parametrize("target", TARGETS)
def test_a_foreign_checkpoint_has_the_hash_of_its_weights(target, foreign, tmp_path):
    folder = foreign(target)
    loaded = Retriever.from_pretrained(folder)
    base = Retriever.from_pretrained(tmp_path / "base").contract.base_hash
    assert loaded.contract.base_hash == hash_weights(loaded.weights()) == base


@pytest.mark.parametrize("target", TARGETS)
def test_the_hash_stays_when_the_weights_change(target, foreign, tmp_path):
    loaded = Retriever.from_pretrained(foreign(target))
    first = loaded.contract.base_hash
    loaded.projection.weight.data.add_(1)
    loaded.save_pretrained(tmp_path / "trained")
    assert Retriever.from_pretrained(tmp_path / "trained").contract.base_hash == first


@pytest.mark.parametrize("target", TARGETS)
def test_a_foreign_folder_is_planned_with(target, foreign, write_recipe, capsys):
    folder = foreign(target)
    recipe = write_recipe(model=str(folder))
    assert yaml.safe_load(recipe.read_text())["model"] == str(folder)
    assert plan_command(recipe)
    assert "steps" in capsys.readouterr().out
    outline = outline_of(folder).retriever
    loaded = Retriever.from_pretrained(folder)
    shapes = {name: tuple(weight.shape) for name, weight in loaded.named_parameters()}
    assert {name: tuple(weight.shape) for name, weight in outline.named_parameters()} == shapes
