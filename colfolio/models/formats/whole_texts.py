"""Texts are read wholly, and as they are: what a library does otherwise is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from colfolio.data.prompts import QUERY_SLOT, Prompter
from colfolio.errors import CheckpointError
from colfolio.models.contract import Contract
from colfolio.models.files import TOKENIZER_FILE, read_json
from colfolio.models.formats.chat import whole_query
from colfolio.models.formats.usage import TOKENIZER_CONFIG

_LONG = 8192  # tokens, more than a query or a page has: a limit from here on cuts nothing
_PROBES = ("what does the page say?", "a", "chapter 12: results")


def limits_of(place: Path, settings: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Limits under which sentence-transformers cuts texts, each by name and value.

    Args:
        place: of the tokenizer.
        settings: of the module `Transformer`, whose limit holds in place of the tokenizer's.
    """
    path = place / TOKENIZER_CONFIG
    said = read_json(path) if path.is_file() else {}
    limits = {"max_seq_length": settings.get("max_seq_length")}
    if limits["max_seq_length"] is None:
        limits[f"model_max_length in {TOKENIZER_CONFIG}"] = said.get("model_max_length")
    cut: Any = tokenizer.truncation
    limits[f"truncation in {TOKENIZER_FILE}"] = None if cut is None else cut.get("max_length")
    return [
        f"{name} {limit!r}"
        for name, limit in limits.items()
        if limit is not None and not (isinstance(limit, int | float) and limit >= _LONG)
    ]


def refuse_added_tokens(tokenizer: Tokenizer, origin: str) -> None:
    """Refuse a tokenizer that puts tokens around each text, where no contract says the strings.

    Raises:
        CheckpointError: its post-processor does.
    """
    if tokenizer.num_special_tokens_to_add(False):
        added = tokenizer.encode(_PROBES[0], add_special_tokens=True)
        plain = set(tokenizer.encode(_PROBES[0], add_special_tokens=False).tokens)
        raise CheckpointError(
            f"{origin}: post_processor in {TOKENIZER_FILE} puts tokens around every text "
            f"({[token for token in added.tokens if token not in plain]}), and so its library "
            "encodes queries and pages; here templates say all of a string. Take it out of "
            f"{TOKENIZER_FILE} if the model was trained without"
        )


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that neither cuts, nor pads, nor adds tokens, for libraries that ask it to."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    if plain.num_special_tokens_to_add(False):
        plain.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    return plain


def check_strings(contract: Contract, tokenizer: Tokenizer, target: str) -> None:
    """Refuse templates that other libraries, which write strings, would read as other tokens.

    Raises:
        CheckpointError: the augmentation token is an ordinary word, which melts into the text
            beside it; or a whole string has other tokens than its parts.
    """
    templates = contract.templates
    advice = "export it `--to colfolio`"
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if templates.query_suffix not in special:
        raise CheckpointError(
            f"query_suffix {templates.query_suffix!r} is an ordinary word of the vocabulary, which "
            f"{target} writes as text behind the query and reads as other tokens; {advice}"
        )
    prompter = Prompter(tokenizer, templates)
    plain = plain_tokenizer(tokenizer)
    strings = [whole_query(templates).replace(QUERY_SLOT, probe) for probe in _PROBES]
    ours = [*prompter.query_ids(_PROBES), *prompter.document_ids([1])]
    for ids, text in zip(ours, [*strings, templates.document], strict=True):
        if plain.encode(text, add_special_tokens=False).ids != ids:
            raise CheckpointError(
                f"{target} reads the whole string {text!r} as other tokens than those that this "
                f"model was trained on; {advice}"
            )
