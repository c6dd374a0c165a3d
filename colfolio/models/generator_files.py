"""A generator's folder: read in the layouts that its family is published in, written likewise.

Our folder is one that `transformers` loads, with our contract beside; of a grafted backbone, which
`transformers` does not know, it is read here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel

from colfolio.errors import CheckpointError
from colfolio.models.chat_contract import (
    CHAT_CONTRACT_FILE,
    ChatContract,
    check_chat_contract,
    check_saved_chat,
    first_contract,
    load_chat_contract,
    save_chat_contract,
)
from colfolio.models.checkpoint import (
    check_shapes,
    check_tokenizer,
    empty_backbone,
    restore_buffers,
)
from colfolio.models.contract import CONTRACT_FILE, Source
from colfolio.models.files import (
    CONFIG_FILE,
    load_config,
    load_tokenizer,
    read_json,
    save_tokenizer,
    whole_folder,
    write_json,
)
from colfolio.models.formats.images import write_processor_files
from colfolio.models.formats.layouts import NESTED, to_our_names, to_their_names
from colfolio.models.hub import Location
from colfolio.models.linear import FastLinear, linear
from colfolio.models.weights import WEIGHTS_FILE, check_dtypes, read_weights, write_weights

HEAD = "lm_head.weight"
# whichever class their configuration names, folders with one of these hold vectors
_OF_RETRIEVERS = (CONTRACT_FILE, "adapter_config.json", "modules.json")
_EMBEDDING = "language_model.embed_tokens.weight"
# of `transformers`: the class with a head, and its processor
_CLASSES = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLProcessor"),
    "colfolio_grafted": ("Generator", "Qwen2VLProcessor"),
}


class TiedHead(nn.Module):
    """A language-model head without weights of its own: it multiplies by the embedding."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that its weight counts once

    @property
    def weight(self) -> Tensor:
        """That of the embedding."""
        return self._embedding[0].weight

    def forward(self, states: Tensor) -> Tensor:
        """A logit for each row of the embedding."""
        weight = self.weight
        if isinstance(weight, DTensor):  # spread over ranks, whose gradients add up
            weight = weight.full_tensor(grad_placements=[Partial()])
        return linear(states, weight)


def is_tied(config: PretrainedConfig) -> bool:
    """Whether the head is the embedding; of a grafted decoder, as its own configuration says."""
    is_grafted = config.model_type == "colfolio_grafted"
    whose: Any = config.get_text_config() if is_grafted else config
    return bool(getattr(whose, "tie_word_embeddings", False))


def assemble_generator(
    config: PretrainedConfig, weights: Mapping[str, Tensor], origin: str
) -> tuple[PreTrainedModel, nn.Module]:
    """Backbone and head of exactly these weights; nothing is drawn or copied.

    Args:
        weights: by the names of `Generator.weights`.

    Raises:
        CheckpointError: the configuration fits no model, or the weights are not exactly those of
            the architecture; all missing and unexpected names are listed.
    """
    backbone, head = empty_generator(config, origin)
    expected = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    if not is_tied(config):
        expected[HEAD] = expected[_EMBEDDING]
    check_shapes(expected, weights, origin)
    check_dtypes(weights, HEAD, origin)
    rest = {name: tensor for name, tensor in weights.items() if name != HEAD}
    backbone.load_state_dict(rest, strict=True, assign=True)
    restore_buffers(backbone)
    if not is_tied(config):
        head.load_state_dict({"weight": weights[HEAD]}, strict=True, assign=True)
    return backbone, head


def empty_generator(config: PretrainedConfig, origin: str) -> tuple[PreTrainedModel, nn.Module]:
    """Backbone and head of a configuration on the meta device.

    Raises:
        CheckpointError: no model has this configuration.
    """
    backbone: Any = empty_backbone(config, origin)
    embedding = backbone.language_model.embed_tokens
    if is_tied(config):
        return backbone, TiedHead(embedding)
    with torch.device("meta"):
        head = FastLinear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
    return backbone, head


def read_generator(
    location: Location,
) -> tuple[PreTrainedModel, nn.Module, Tokenizer, ChatContract]:
    """Backbone, head, tokenizer and contract of a folder; a hub id's commit is pinned.

    Raises:
        CheckpointError: a file is missing or damaged, or not the one that was saved, the tensors
            are not exactly those of the architecture, or the folder holds a retriever.
    """
    folder, origin = location.folder, str(location.folder)
    config, contract = read_promises(folder)
    weights = _read_weights(folder, config)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, config, origin)
    backbone, head = assemble_generator(config, weights, origin)
    contract = check_saved_chat(contract, weights, origin)
    if location.hub_id is not None:
        here = Source(name=location.hub_id, revision=location.commit)
        updated = {"loaded_from": here, "source": contract.source or here}
        contract = contract.model_copy(update=updated)
    return backbone, head, tokenizer, contract


def is_generator(folder: Path) -> bool:
    """Whether a folder says that it holds a model with a language-model head.

    One of ours says so by its contract, a published one by the class in its configuration.
    """
    if (folder / CHAT_CONTRACT_FILE).is_file():
        return True
    if any((folder / name).exists() for name in _OF_RETRIEVERS):
        return False
    config = folder / CONFIG_FILE
    named = read_json(config).get("architectures") if config.is_file() else None
    return isinstance(named, list) and any(named == [each] for each, _ in _CLASSES.values())


def refuse_generator(folder: Path) -> None:
    """Refuse a folder of a generator where a retriever is needed.

    Raises:
        CheckpointError: it is one.
    """
    if is_generator(folder):
        raise CheckpointError(
            f"{folder}: is a generator, whose head gives words, so it has no vectors; make the "
            f"base of a retriever from it with `colfolio init {folder} --out FOLDER`, or set "
            "train.objective to generation"
        )


def read_promises(folder: Path) -> tuple[PretrainedConfig, ChatContract]:
    """Configuration and contract of a folder, which fit one another; no weights are read.

    Raises:
        CheckpointError: a file is missing or damaged, or not the one that was saved, or the folder
            holds a retriever.
    """
    if (folder / CONTRACT_FILE).exists():
        raise CheckpointError(
            f"{folder}: is a retriever ({CONTRACT_FILE}), whose head gives vectors, so "
            "it generates no text; train.objective: generation starts from a model with a "
            "language-model head, such as Qwen2-VL"
        )
    if (folder / CHAT_CONTRACT_FILE).exists():
        contract = load_chat_contract(folder)
        config = load_config(folder)
    else:
        config = load_config(folder)
        contract = first_contract(folder, config)
    check_chat_contract(contract, config, str(folder))
    return config, contract


def save_generator(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: PretrainedConfig,
    tokenizer: Tokenizer,
    contract: ChatContract,
) -> None:
    """Write a folder that `transformers` loads, with our contract; aside first, then renamed.

    Args:
        weights: by the names of `Generator.weights`.

    Raises:
        CheckpointError: the folder exists and holds something else than a checkpoint, or the
            weights cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    architecture, processor = _CLASSES[config.model_type]
    values = config.to_dict() | {"architectures": [architecture]}
    values["dtype"] = str(plain[_EMBEDDING].dtype).removeprefix("torch.")
    values.pop("_attn_implementation", None)
    backbone = {name: tensor for name, tensor in plain.items() if name != HEAD}
    head = {HEAD: plain[HEAD]} if HEAD in plain else {}
    with whole_folder(folder, (CONFIG_FILE,)) as aside:
        write_weights(to_their_names(backbone, NESTED) | head, aside / WEIGHTS_FILE)
        write_json(values, aside / CONFIG_FILE)
        end = {"eos_token_id": tokenizer.token_to_id(contract.templates.end)}
        write_json(end, aside / "generation_config.json")
        write_processor_files(contract.pixel_budget, config.model_type, aside, processor)
        save_tokenizer(tokenizer, aside)
        save_chat_contract(contract, aside, plain)


def _read_weights(folder: Path, config: PretrainedConfig) -> dict[str, Tensor]:
    """All tensors by our names; of a tied head, which some files hold as well, the embedding."""
    found = read_weights(folder)
    head = found.pop(HEAD, None)
    weights = to_our_names(found, "backbone", str(folder))
    if head is None:
        return weights
    if not is_tied(config):
        return weights | {HEAD: head}
    embedding = weights.get(_EMBEDDING)
    if embedding is not None and not torch.equal(head, embedding):
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} says that the head is the embedding (tie_word_embeddings), "
            f"but {HEAD} holds other values; set it to false, or leave {HEAD} out"
        )
    return weights
