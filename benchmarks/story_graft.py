"""A small decoder that knows text alone, a vision tower that knows nothing, and the two as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from story_clips import DIRECTIONS, text_rows
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from colfolio.batch import UNLABELLED
from colfolio.data.chat import ChatTemplates
from colfolio.data.conversation_batches import in_order
from colfolio.data.conversations import ConversationDataset
from colfolio.distributed import World
from colfolio.models import Shape, generator_from_graft, train_tokenizer
from colfolio.models.encoding import evaluating
from colfolio.models.generator import Generator
from colfolio.models.generator_base import generator_from_shape
from colfolio.models.shape import TokenizerSettings
from colfolio.mrope import watch

WIDTH, HEADS = 96, 4
# texts and clips are short, so no frequency need be slow, and one place off must be felt
ROPE_THETA = 30.0
# Rows and columns turn its fastest frequencies. With `qwen2_vl`, where columns turn the slowest,
# directions are learnt too, but not within the steps of the quick form.
SCHEME = "videorope"
TEMPLATES = ChatTemplates(
    visual="<|vision_start|><|image_pad|><|vision_end|>",
    question="<|im_start|>{question}<|im_end|>",
)
TOWER = {
    "family": "qwen2_vl",
    "backbone": {
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 4, 4]},
        },
        "vision_config": {
            "depth": 2,
            "patch_size": 7,
            "embed_dim": 64,
            "hidden_size": WIDTH,
            "num_heads": 2,
            "mlp_ratio": 2,
            "initializer_range": 0.05,
        },
    },
    "pixel_budget": {"patch": 7, "min_pixels": 196, "max_pixels": 50176},
}
_BATCH, _RATE = 64, 3e-3
_POOL = 2000  # texts for the tokenizer


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a whole split, each token predicted behind the right ones.

    Args:
        loss, accuracy: of all answer tokens.
        direction: accuracy at the words of direction, of which chance is a quarter.
        exact: share of answers without a mistake, which are those that greedy decoding gives.
    """

    loss: float
    accuracy: float
    direction: float
    exact: float


def write_decoder(folder: Path, pairs: Sequence, steps: int, layers: int, seed: int) -> float:
    """Train a language model on texts with positions 0, 1, 2, and write it; returns its last loss.

    Contexts, questions and answers are all learnt, in the form that `TEMPLATES` gives them.
    """
    generator = np.random.default_rng((seed, 2))
    texts = (" ".join(row) for row in text_rows(pairs, _POOL, generator))
    tokenizer = train_tokenizer(texts, TokenizerSettings())
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(_decoder_config(tokenizer.get_vocab_size(), layers))
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.98))
    loss = torch.zeros(())
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = _RATE * min(1, (step + 1) / 50) * math.cos(math.pi * step / steps / 2)
        ids = _text_batch(tokenizer, list(text_rows(pairs, _BATCH, generator)))
        logits = model(ids.clamp(min=0)).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, 1:].flatten(), ignore_index=UNLABELLED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return loss.item()


def write_tower(folder: Path, decoder: Path, seed: int) -> None:
    """Write a Qwen2-VL with random weights, of which a graft takes the vision tower."""
    tokenizer = Tokenizer.from_file(str(decoder / "tokenizer.json"))
    generator_from_shape(Shape.model_validate(TOWER), tokenizer, seed).save_pretrained(folder)


def grafted(decoder: Path, tower: Path, seed: int) -> Generator:
    """Both as one, ready to be trained."""
    return generator_from_graft(decoder, tower, seed, SCHEME, TEMPLATES)


def outcome_of(generator: Generator, dataset: ConversationDataset, rows: int = 64) -> Outcome:
    """How well a generator describes each clip of a split."""
    words = [generator.tokenizer.encode(f" {word}").ids for word in DIRECTIONS]
    assert all(len(ids) == 1 for ids in words), "a word of direction is one token"
    found: list[Tensor] = []
    exact: list[Tensor] = []
    rate = generator.contract.frame_rate
    with evaluating(generator), torch.no_grad():
        for batch in in_order(dataset, generator.chat, rate, rows, World()):
            is_labelled = batch.labels != UNLABELLED
            labels, places = batch.labels[is_labelled], is_labelled.nonzero().flatten()
            logits = generator(batch.inputs, places)
            losses = F.cross_entropy(logits, labels, reduction="none")
            is_right = logits.argmax(1) == labels
            is_direction = torch.isin(labels, torch.tensor(words).flatten())
            found.append(torch.stack([losses, is_right, is_direction]))
            row = torch.searchsorted(batch.inputs.offsets, places, right=True) - 1
            wrong = torch.zeros(len(batch)).index_add_(0, row, (~is_right).float())
            exact.append(wrong == 0)
    losses, is_right, is_direction = torch.cat(found, dim=1)
    return Outcome(
        losses.mean().item(),
        is_right.mean().item(),
        is_right[is_direction.bool()].mean().item(),
        torch.cat(exact).float().mean().item(),
    )


def positions_seen(generator: Generator, dataset: ConversationDataset) -> str:
    """What the guard says of the positions that reach the decoder: `right`, or the faults."""
    batches = in_order(dataset, generator.chat, generator.contract.frame_rate, 4, World())
    inputs = next(iter(batches)).inputs
    with evaluating(generator), torch.no_grad(), watch(generator) as watched:
        generator(inputs, torch.tensor([len(inputs.token_ids) - 1]))
    return ", ".join(sorted(watched.verdict.faults)) or "right"


def _decoder_config(vocabulary: int, layers: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        initializer_range=0.05,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=0,
        eos_token_id=0,
    )


def _text_batch(tokenizer: Tokenizer, rows: list[tuple[str, str, str]]) -> Tensor:
    """Token ids of texts in the form of a conversation, shorter ones filled up behind."""
    texts = [
        context + TEMPLATES.question.format(question=question) + answer + TEMPLATES.end
        for context, question, answer in rows
    ]
    ids = [torch.tensor(each.ids) for each in tokenizer.encode_batch(texts)]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=UNLABELLED)
