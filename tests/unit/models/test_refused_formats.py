"""What a folder of another library asks for and a contract cannot say is refused by name."""

import shutil

import pytest
import torch
from exports import WEIGHTS, change, change_weights, drop, set_modules

from colfolio.errors import CheckpointError
from colfolio.models import Retriever
from colfolio.models.formats import read

REFUSED = {
    "code of its own": (
        "transformers",
        lambda f: change(f / "config.json", auto_map={"AutoModel": "model.Col"}),
        "auto_map",
    ),
    "code of its own, inside": (
        "colpali-engine",
        lambda f: change(f / "config.json", trust_remote_code=True),
        "trust_remote_code",
    ),
    "no backbone inside": (
        "transformers",
        lambda f: drop(f / "config.json", "vlm_config"),
        "vlm_config",
    ),
    "another backbone inside": (
        "transformers",
        lambda f: change(f / "config.json", vlm_config={"model_type": "paligemma"}),
        "paligemma",
    ),
    "a prefix that is no text": (
        "transformers",
        lambda f: change(f / "processor_config.json", query_prefix=3),
        "query_prefix",
    ),
    "a module of another package": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m[1].update(type="their_code.Dense")),
        r"their_code\.Dense",
    ),
    "a module outside": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m[1].update(path="../1_Dense")),
        r"outside.*\.\./1_Dense",
    ),
    "a module in the parent": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m[1].update(path="..")),
        "outside",
    ),
    "a module behind a link": (
        "sentence-transformers",
        lambda f: (
            shutil.move(f / "1_Dense", f.parent / "1_Dense"),
            (f / "1_Dense").symlink_to(f.parent / "1_Dense"),
        ),
        "outside",
    ),
    "a module without a type": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m[1].pop("type")),
        "type",
    ),
    "pooled vectors": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m[2].update(type="sentence_transformers.a.Pooling")),
        "Pooling",
    ),
    "two projections": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m.append(m[1])),
        "Dense twice",
    ),
    "vectors of any length": (
        "sentence-transformers",
        lambda f: set_modules(f, lambda m: m.pop()),
        "Normalize",
    ),
    "no list of modules": (
        "sentence-transformers",
        lambda f: (f / "modules.json").write_text("{}"),
        r"modules\.json",
    ),
    "another task": (
        "sentence-transformers",
        lambda f: change(f / "sentence_bert_config.json", transformer_task="fill-mask"),
        "fill-mask",
    ),
    "an activation": (
        "sentence-transformers",
        lambda f: change(f / "1_Dense/config.json", activation_function="torch.nn.Tanh"),
        "Tanh",
    ),
    "an activation by default": (
        "sentence-transformers",
        lambda f: drop(f / "1_Dense/config.json", "activation_function"),
        "Tanh",
    ),
    "one vector a page": (
        "sentence-transformers",
        lambda f: change(f / "1_Dense/config.json", module_input_name="sentence_embedding"),
        "sentence_embedding",
    ),
    "a residual": (
        "sentence-transformers",
        lambda f: change(f / "1_Dense/config.json", use_residual=True),
        "use_residual",
    ),
    "more in the projection": (
        "sentence-transformers",
        lambda f: change_weights(
            f / "1_Dense" / WEIGHTS, lambda w: w.update({"residual.weight": torch.zeros(2)})
        ),
        r"residual\.weight",
    ),
    "a projection in two places": (
        "sentence-transformers",
        lambda f: change_weights(
            f / WEIGHTS, lambda w: w.update({"custom_text_proj.bias": torch.zeros(2)})
        ),
        "two places",
    ),
    "words that are left out": (
        "sentence-transformers",
        lambda f: change(f / "2_MultiVectorMask/config.json", skiplist_words=[","]),
        "skiplist_words",
    ),
    "vectors that are left out": (
        "sentence-transformers",
        lambda f: change(f / "2_MultiVectorMask/config.json", keep_only_token_ids=[5]),
        "keep_only_token_ids",
    ),
    "queries that are cut": (
        "sentence-transformers",
        lambda f: change(f / "sentence_bert_config.json", query_length=32),
        "query_length 32",
    ),
    "queries that are filled up": (
        "sentence-transformers",
        lambda f: change(f / "sentence_bert_config.json", query_expansion={"length": 32}),
        "query_expansion",
    ),
    "texts that are processed otherwise": (
        "sentence-transformers",
        lambda f: change(
            f / "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 3}}
        ),
        "processing_kwargs 'text'",
    ),
    "pages without a chat template": (
        "sentence-transformers",
        lambda f: (f / "chat_template.jinja").unlink(),
        r"chat_template\.jinja",
    ),
    "a chat template that fails": (
        "sentence-transformers",
        lambda f: (f / "chat_template.jinja").write_text("{{ nothing.at.all }}"),
        "cannot be run",
    ),
    "a chat template that reaches out": (
        "sentence-transformers",
        lambda f: (f / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}"),
        "cannot be run",
    ),
    "a chat template without images": (
        "sentence-transformers",
        lambda f: (f / "chat_template.jinja").write_text("{{ '{query}' }}"),
        "image_pad",
    ),
    "no messages": (
        "sentence-transformers",
        lambda f: change(f / "sentence_bert_config.json", modality_config={"text": {}}),
        "modality_config",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(case, folder_of):
    target, tamper, words = REFUSED[case]
    folder = folder_of(target)
    tamper(folder)
    with pytest.raises(CheckpointError, match=words):
        Retriever.from_pretrained(folder)


def test_a_projection_without_a_bias_has_one_of_zeros(folder_of, exported):
    folder = folder_of("sentence-transformers")
    change(folder / "1_Dense/config.json", bias=False)
    change_weights(folder / "1_Dense" / WEIGHTS, lambda weights: weights.pop("linear.bias"))
    loaded = Retriever.from_pretrained(folder)
    assert torch.equal(loaded.projection.weight, exported[1].projection.weight)
    assert torch.equal(loaded.projection.bias, torch.zeros(128))


def test_image_settings_of_sentence_transformers_win_over_the_processors(folder_of):
    folder = folder_of("sentence-transformers")
    path = folder / "sentence_bert_config.json"
    change(path, processing_kwargs={"image": {"max_pixels": 78400}})
    assert read(folder).contract.pixel_budget.max_pixels == 78400
