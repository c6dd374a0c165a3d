"""Every recipe and shape that ships can be read; the published shape is the published model's."""

from pathlib import Path

import pytest
import torch

from colfolio.commands.run_folder import TrainRecipe
from colfolio.config import load_settings
from colfolio.models import Shape
from colfolio.models.families import FAMILIES

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "recipes", ROOT / "colfolio" / "demo")
FILES = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_a_recipe_or_a_shape(path):
    kind = Shape if "shape" in path.stem else TrainRecipe
    assert isinstance(load_settings(path, kind), kind)


def test_the_large_shape_has_as_many_parameters_as_qwen2_vl_2b():
    shape = load_settings(ROOT / "recipes" / "qwen2-vl-2b-shape.yaml", Shape)
    family = FAMILIES[shape.family]
    with torch.device("meta"):
        backbone = family.backbone(family.config(**shape.backbone))
    # 2,208,985,600 with the tied output layer counted once, as the hub counts them
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 2_208_985_600
