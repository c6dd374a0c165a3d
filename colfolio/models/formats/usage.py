"""How queries and pages enter a checkpoint that has no contract: what its library does today.

The strings around a query are the field's open wound: one checkpoint of ColQwen2 is queried with
"Query: " and ten end tokens by colpali-engine up to 0.3.10, without the prefix from 0.3.11, and
with the prefix and a line break by transformers. So what its files leave open is said in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from colfolio.data.patches import PixelBudget
from colfolio.data.prompts import QUERY_SLOT, Templates
from colfolio.errors import CheckpointError
from colfolio.models.families import family_of
from colfolio.models.files import read_json
from colfolio.models.formats.images import PROCESSOR_FILE, pixel_budget_of

END_TOKEN = "<|endoftext|>"
NUM_END_TOKENS = 10
PAGE = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "Describe the image.<|im_end|><|endoftext|>"
)
PREFIX = "Query: "
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class Usage:
    """Templates and pixel budget of a foreign checkpoint.

    Args:
        of_queries: sentences on what was assumed of the query's string.
        assumed: sentences on what else was.
    """

    templates: Templates
    pixel_budget: PixelBudget
    of_queries: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


def engine_usage(folder: Path, config: PretrainedConfig) -> Usage:
    """As colpali-engine uses a checkpoint from 0.3.11 on."""
    budget, assumed = pixel_budget_of(folder, config)
    templates = Templates(
        query=QUERY_SLOT,
        query_suffix=END_TOKEN,
        num_query_suffix=NUM_END_TOKENS,
        document=PAGE,
        time_stamp=_time_stamp(config),
    )
    sentence = (
        f"the files say no query string: that of colpali-engine from 0.3.11 on is taken, the query "
        f"and {NUM_END_TOKENS} x {END_TOKEN}; up to 0.3.10 it put {PREFIX!r} before the query"
    )
    return Usage(templates, budget, (sentence,), tuple(assumed))


def retrieval_usage(folder: Path, config: PretrainedConfig, prompt: str = "") -> Usage:
    """As `ColQwen2Processor` of transformers uses a checkpoint.

    Args:
        prompt: what a library puts before the text of a query.
    """
    budget, assumed = pixel_budget_of(folder, config)
    path = folder / PROCESSOR_FILE
    said = read_json(path) if path.is_file() else {}
    prefix, page = said.get("query_prefix") or PREFIX, said.get("visual_prompt_prefix") or PAGE
    if not isinstance(prefix, str) or not isinstance(page, str):
        raise CheckpointError(f"{path}: query_prefix and visual_prompt_prefix must be texts")
    # a line break stands behind the end tokens, so they are part of the query's string
    end = token_named(folder, "pad_token") or END_TOKEN
    templates = Templates(
        query=f"{prefix}{prompt}{QUERY_SLOT}{end * NUM_END_TOKENS}\n",
        query_suffix=end,
        num_query_suffix=0,
        document=page,
        time_stamp=_time_stamp(config),
    )
    of_queries = (
        f"queries are written as ColQwen2Processor of transformers writes them, {prefix!r}, the "
        f"query, {NUM_END_TOKENS} x {end} and a line break; the files do not say whether the model "
        "was trained so"
    )
    of_positions = (
        "image tokens get their positions in height and width, as colpali-engine trains; the "
        "forward of transformers' ColQwen2ForRetrieval gives them positions in one dimension"
    )
    return Usage(templates, budget, (of_queries,), (of_positions, *assumed))


def token_named(folder: Path, name: str) -> str | None:
    """A special token that `tokenizer_config.json` names, or None."""
    path = folder / TOKENIZER_CONFIG
    value: Any = read_json(path).get(name) if path.is_file() else None
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _time_stamp(config: PretrainedConfig) -> str:
    """What the family's own processor writes before each step of a clip."""
    return family_of(config.model_type, "config").templates.time_stamp
