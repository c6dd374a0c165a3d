"""What a step did to each part of the model is the same number however many ranks share it."""

import pytest
from ranks import run_in_ranks

from colfolio.data.dataset import load_dataset
from colfolio.distributed import World
from colfolio.models.retriever import Retriever
from colfolio.training import TrainSettings, start_training, train

SETTINGS = {
    "steps": 3,
    "seed": 3,
    "batch": {"rows": 5},
    "optimiser": {"lr": 1e-3, "warmup_steps": 2},
    "precision": "fp32",
    "threads": 1,
}


def run(world, model, data, parallel):
    """The parts of each step's report."""
    settings = TrainSettings.model_validate(SETTINGS | {"parallel": parallel})
    state = start_training(Retriever.from_pretrained(model, device="cpu"), settings, world)
    return [
        {
            name: (part.lr, part.trains, part.gradient_norm, part.update_ratio)
            for name, part in report.parts.items()
        }
        for report in train(state, load_dataset(data, "train"))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_ranks_report_the_parts_of_one(retriever, write_shapes, tmp_path, parallel):
    retriever.save_pretrained(tmp_path / "model")
    write_shapes(tmp_path / "shapes", {"train": 24})
    arguments = (str(tmp_path / "model"), str(tmp_path / "shapes"), parallel)
    alone = run(World(), *arguments)
    first, second = run_in_ranks(run, 2, tmp_path / "ranks", *arguments)
    assert first == second
    for mine, plain in zip(first, alone, strict=True):
        assert list(mine) == list(plain) == list(alone[0])
        for part, numbers in plain.items():
            assert mine[part] == pytest.approx(numbers, rel=1e-3), part
