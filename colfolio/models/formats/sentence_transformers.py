"""Folders of sentence-transformers 6, `MultiVectorEncoder`: their modules, read and written.

A folder is a list of modules. Two lists are late interaction as we know it: a backbone with a
`Dense`, `Normalize` and a scoring mask behind it, and a `*ForRetrieval` model of transformers with
a mask. We write the first, because there a backbone is called with its token ids and its grids and
so makes its own positions, whereas a `ColQwen2ForRetrieval` gives image tokens positions in one
dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PretrainedConfig

from colfolio.errors import CheckpointError
from colfolio.models.contract import PROJECTION
from colfolio.models.families import family_of
from colfolio.models.files import read_json, read_json_list, write_json
from colfolio.models.formats.chat import CHAT_FILE, rendered, templates_of
from colfolio.models.formats.images import pixel_budget_of
from colfolio.models.formats.usage import TOKENIZER_CONFIG, Usage, retrieval_usage, token_named
from colfolio.models.formats.whole_texts import limits_of
from colfolio.models.weights import WEIGHTS_FILE, read_weights, write_weights

MODULES_FILE = "modules.json"
SENTENCE_FILE = "config_sentence_transformers.json"
TRANSFORMER_FILE = "sentence_bert_config.json"
_MODULE_CONFIG = "config.json"
_BACKBONE = ("Transformer", "Dense")
# a mask that keeps all may stand on either side of what makes lengths one
_HEADS = (("MultiVectorMask", "Normalize"), ("Normalize", "MultiVectorMask"), ("Normalize",))
_RETRIEVAL = ("Transformer", "MultiVectorMask")
_OUTPUT = {"method": "forward", "method_output_name": "last_hidden_state"}
# Settings of the first module that change what a model reads, and that a contract has no word for.
_REFUSED = (
    *("query_length", "document_length", "query_expansion", "do_lower_case"),
    *("tokenizer_name_or_path", "tokenizer_args", "processor_kwargs"),
    *("config_args", "config_kwargs"),
)
_PROCESSING = ("image", "chat_template")
_CUTTING = ("truncation", "max_length")  # a chat template is called with them
# Of PyLate's older folders: any of them has queries filled up to a fixed length.
_OLDER = (
    *("query_prefix", "document_prefix", "query_length", "document_length", "query_expansion"),
    *("do_query_expansion", "attend_to_expansion_tokens", "attend_to_mask_tokens"),
    "skiplist_words",
)
_SCORES = (None, "maxsim")
# What we write: folders, classes, and settings of all but the first.
_WRITTEN = {
    "": "base.modules.transformer.Transformer",
    "1_Dense": "base.modules.dense.Dense",
    "2_MultiVectorMask": "multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
    "3_Normalize": "base.modules.normalize.Normalize",
}
_TOKENS = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
_IDENTITY = "torch.nn.modules.linear.Identity"
_SETTINGS: dict[str, dict[str, Any]] = {
    "1_Dense": {"bias": True, "activation_function": _IDENTITY} | _TOKENS,
    "2_MultiVectorMask": {
        "skiplist_words": [],
        "skiplist_tasks": ["document"],
        "keep_only_token_ids": None,
    },
    "3_Normalize": _TOKENS,
}


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of a folder, by the last name of their class, and where they lie.

    Args:
        folders: of each module.
        is_retrieval: whether the first is a `*ForRetrieval` model, which projects by itself.
        settings: of the first module.
        prompts: what is put before queries and documents.
    """

    folders: Mapping[str, Path]
    is_retrieval: bool
    settings: Mapping[str, Any]
    prompts: Mapping[str, str]

    @property
    def backbone(self) -> Path:
        """Where the backbone's weights and configuration are."""
        return self.folders["Transformer"]


def read_modules(folder: Path) -> Modules:
    """The modules of a folder of sentence-transformers.

    Raises:
        CheckpointError: they are not late interaction as a contract can say it, one is a class of
            another package, or lies outside the folder.
    """
    path = folder / MODULES_FILE
    folders: dict[str, Path] = {}
    for entry in read_json_list(path):
        name, place = _name_of(entry, path), str(entry.get("path", ""))
        # a link out of the folder, too
        if place and (folder / place).resolve().parent != folder.resolve():
            raise CheckpointError(f"{path}: module {name} lies outside the folder, at {place!r}")
        if name in folders:
            raise CheckpointError(f"{path}: has {name} twice")
        folders[name] = folder / place
    kinds = tuple(folders)
    is_known = kinds == _RETRIEVAL or (kinds[:2] == _BACKBONE and kinds[2:] in _HEADS)
    if not is_known:
        raise CheckpointError(
            f"{path}: modules {', '.join(kinds) or 'none'}; read here are "
            f"{', '.join(_RETRIEVAL)} and {', '.join(_BACKBONE)} with Normalize behind, with or "
            "without MultiVectorMask"
        )
    settings = read_json(folders["Transformer"] / TRANSFORMER_FILE)
    task = settings.get("transformer_task", "feature-extraction")
    expected = "retrieval" if kinds == _RETRIEVAL else "feature-extraction"
    if task != expected:
        raise CheckpointError(
            f"{folder / TRANSFORMER_FILE}: transformer_task {task!r}, not {expected!r}"
        )
    return Modules(folders, kinds == _RETRIEVAL, settings, _prompts(folder))


def read_dense(modules: Modules) -> dict[str, Tensor]:
    """The projection's tensors under our names; a layer without a bias has one of zeros.

    Raises:
        CheckpointError: the layer does more than a linear map of the tokens' states.
    """
    folder = modules.folders["Dense"]
    path, values = folder / _MODULE_CONFIG, read_json(folder / _MODULE_CONFIG)
    expected = {"activation_function": _IDENTITY, "use_residual": False} | _TOKENS
    wrong = [f"{k} {values[k]!r}" for k, right in expected.items() if values.get(k, right) != right]
    if "activation_function" not in values:
        wrong.append("no activation_function, which means Tanh")
    weights = read_weights(folder)
    known = {"linear.weight", "linear.bias"} if values.get("bias", True) else {"linear.weight"}
    wrong += [f"tensors {sorted(weights)}"] if set(weights) != known else []
    if wrong:
        raise CheckpointError(
            f"{path}: a projection is one linear map of the tokens' states: {', '.join(wrong)}"
        )
    weight = weights["linear.weight"]
    bias = weights.get("linear.bias")
    return {
        PROJECTION + "weight": weight,
        PROJECTION + "bias": torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias,
    }


def refuse_unsaid(folder: Path, modules: Modules, tokenizer: Tokenizer) -> None:
    """Refuse what changes vectors or scores, or leaves some out, and a contract has no word for.

    Raises:
        CheckpointError: names all of it.
    """
    wrong = [
        f"{name} {modules.settings[name]!r}" for name in _REFUSED if modules.settings.get(name)
    ]
    processing = modules.settings.get("processing_kwargs") or {}
    wrong += [f"processing_kwargs {name!r}" for name in processing if name not in _PROCESSING]
    called = processing.get("chat_template") or {}
    wrong += [f"chat_template {name} {called[name]!r}" for name in _CUTTING if called.get(name)]
    wrong += limits_of(modules.backbone, modules.settings, tokenizer)
    if "MultiVectorMask" in modules.folders:
        values = read_json(modules.folders["MultiVectorMask"] / _MODULE_CONFIG)
        wrong += [
            f"{name} {values[name]!r}"
            for name in ("skiplist_words", "keep_only_token_ids")
            if values.get(name)
        ]
    wrong += _unsaid_of_model(folder)
    if wrong:
        raise CheckpointError(
            f"{modules.backbone}: every token of a query and a page gives a vector here, texts are "
            f"read wholly, and scores are sums over a query's vectors; it asks otherwise: "
            f"{', '.join(wrong)}"
        )


def _unsaid_of_model(folder: Path) -> list[str]:
    """What the settings of the whole model ask, beside prompts."""
    path = folder / SENTENCE_FILE
    said = read_json(path) if path.is_file() else {}
    wrong = [f"{name} {said[name]!r}" for name in _OLDER if name in said]
    score = said.get("similarity_fn_name")
    return wrong if score in _SCORES else [*wrong, f"similarity_fn_name {score!r}"]


def sentence_usage(
    folder: Path, modules: Modules, config: PretrainedConfig, tokenizer: Tokenizer
) -> Usage:
    """How sentence-transformers uses a folder: by its chat template, or by its processor.

    Raises:
        CheckpointError: its templates cannot be read, or say nothing of images.
    """
    place = modules.backbone
    if modules.is_retrieval:
        return retrieval_usage(place, config, modules.prompts.get("query", ""))
    known = modules.settings.get("modality_config", {})
    if known.get("message", {}).get("format", "structured") != "structured" or (
        known and "message" not in known
    ):
        raise CheckpointError(
            f"{place / TRANSFORMER_FILE}: pages are read by a chat template with structured "
            f"messages; its modality_config has {sorted(known)}"
        )
    processing = modules.settings.get("processing_kwargs") or {}
    template, origin = _template(place)
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: token for name in names if (token := token_named(place, name))}
    values = tokens | dict(processing.get("chat_template", {}))
    query, page = rendered(template, origin, dict(modules.prompts), **values)
    budget, assumed = pixel_budget_of(place, config, processing.get("image"))
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
    stamp = family_of(config.model_type, str(folder)).templates.time_stamp
    templates = templates_of(query, page, special, origin, stamp)
    return Usage(templates, budget, assumed=tuple(assumed))


def write_modules(projection: Mapping[str, Tensor], folder: Path) -> None:
    """Write the list of modules and all but the backbone: projection, mask, lengths of one.

    Args:
        projection: its `weight` and `bias`.
    """
    rows, width = projection["weight"].shape
    sizes = {"1_Dense": {"in_features": width, "out_features": rows}}
    entries = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.{kind}"}
        for number, (place, kind) in enumerate(_WRITTEN.items())
    ]
    write_json(entries, folder / MODULES_FILE)
    for place, values in _SETTINGS.items():
        (folder / place).mkdir()
        write_json(values | sizes.get(place, {}), folder / place / _MODULE_CONFIG)
    dense = {f"linear.{name}": tensor for name, tensor in projection.items()}
    write_weights(dense, folder / "1_Dense" / WEIGHTS_FILE)
    _write_settings(folder)


def _write_settings(folder: Path) -> None:
    modalities = dict.fromkeys(("text", "image", "video"), _OUTPUT)
    message = _OUTPUT | {"format": "structured"}
    write_json(
        {
            "transformer_task": "feature-extraction",
            "modality_config": modalities | {"message": message},
            "module_output_name": "token_embeddings",
        },
        folder / TRANSFORMER_FILE,
    )
    write_json(
        {
            "model_type": "MultiVectorEncoder",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "maxsim",
        },
        folder / SENTENCE_FILE,
    )


def _name_of(entry: Any, path: Path) -> str:
    kind = entry.get("type") if isinstance(entry, dict) else None
    if not isinstance(kind, str):
        raise CheckpointError(f"{path}: each module needs a type, found {entry!r}")
    if not kind.startswith("sentence_transformers."):
        raise CheckpointError(
            f"{path}: module {kind} is code of another package; a checkpoint is read here without "
            "running code that it brings"
        )
    return kind.rsplit(".", 1)[1]


def _prompts(folder: Path) -> dict[str, str]:
    path = folder / SENTENCE_FILE
    prompts = read_json(path).get("prompts") if path.is_file() else None
    if not isinstance(prompts, dict):
        return {}
    return {task: text for task in ("query", "document") if (text := prompts.get(task))}


def _template(place: Path) -> tuple[str, str]:
    """The chat template, and the file it stands in."""
    path = place / CHAT_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    for name in ("chat_template.json", TOKENIZER_CONFIG):
        path = place / name
        template = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(template, str):
            return template, str(path)
    raise CheckpointError(f"{place}: no {CHAT_FILE}, so what stands around a page is unknown")
