"""The whole public path on synthetic images: written, initialised, trained, evaluated."""

import time

import pytest
import yaml

from colfolio.commands.evaluate import evaluate_command
from colfolio.commands.init import init_command
from colfolio.commands.train import train_command

WIDTH = 64
SHAPE = {
    "dim": 32,
    "backbone": {
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.05,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
            },
        },
        "vision_config": {
            "depth": 2,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": 2,
            "mlp_ratio": 2,
            "initializer_range": 0.05,
        },
    },
    "templates": {
        "num_query_suffix": 2,
        "document": "<|vision_start|><|image_pad|><|vision_end|>",
    },
    "pixel_budget": {"min_pixels": 784, "max_pixels": 50176},
    "tokenizer": {"vocab_size": 300},
}
TRAIN = {
    "steps": 150,
    "batch": {"rows": 64},
    "optimiser": {"lr": 2e-3, "warmup_steps": 20},
    "precision": "fp32",
    "threads": 2,
}


@pytest.mark.slow
def test_a_tiny_model_learns_to_find_combinations_of_shapes_it_never_saw(
    tmp_path, write_shapes, restore_threads
):
    write_shapes(tmp_path / "set", {"train": 512, "validation": 32, "test": 128})
    (tmp_path / "shape.yaml").write_text(yaml.safe_dump(SHAPE))
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "model": str(tmp_path / "base"),
                "dataset": str(tmp_path / "set"),
                "out": str(tmp_path / "run"),
                "train": TRAIN,
            }
        )
    )
    init_command(str(tmp_path / "shape.yaml"), tmp_path / "base", dataset=str(tmp_path / "set"))
    untrained = evaluate_command(tmp_path / "base", tmp_path / "set", "test").metric("ndcg@5")
    begin = time.process_time()
    train_command(tmp_path / "recipe.yaml")
    seconds = time.process_time() - begin
    trained = evaluate_command(tmp_path / "run" / "model", tmp_path / "set", "test").metric(
        "ndcg@5"
    )
    assert untrained.value < 0.15  # chance 0.023
    assert trained.chance < 0.03
    assert trained.value >= 0.9
    assert seconds < 2 * 30  # of two threads
