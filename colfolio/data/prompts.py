"""Templates to token ids: what the model reads around a query and around an image."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from pydantic import Field
from tokenizers import Tokenizer

from colfolio.config import Settings
from colfolio.errors import CheckpointError

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
QUERY_SLOT = "{query}"


class Templates(Settings):
    """The strings around a query and around an image, as a checkpoint was trained with them.

    Args:
        query: holds `{query}` once.
        query_suffix: an augmentation token (query expansion of ColBERT), put behind the query
            `num_query_suffix` times.
        document: holds `<|image_pad|>` once; it is repeated once a visual token. Around a clip it
            is the same, with `<|video_pad|>` in that place.
    """

    query: str = QUERY_SLOT
    query_suffix: str = "<|endoftext|>"
    num_query_suffix: int = Field(default=10, ge=0)
    document: str = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "Describe the image.<|im_end|><|endoftext|>"
    )


class Prompter:
    """Token ids of queries and documents under one set of templates.

    Raises:
        CheckpointError: a template lacks its slot, or the tokenizer lacks a special token of it.
    """

    def __init__(self, tokenizer: Tokenizer, templates: Templates) -> None:
        if templates.query.count(QUERY_SLOT) != 1 or templates.document.count(IMAGE_TOKEN) != 1:
            raise CheckpointError(
                f"templates: the query needs {QUERY_SLOT} once and the document {IMAGE_TOKEN} once,"
                f" received {templates.query!r} and {templates.document!r}"
            )
        self.image_token_id = _special_id(tokenizer, IMAGE_TOKEN)
        # None: a tokenizer without it serves pages all the same
        self.video_token_id: int | None = tokenizer.token_to_id(VIDEO_TOKEN)
        suffix = _special_id(tokenizer, templates.query_suffix)
        self._suffix = [suffix] * templates.num_query_suffix
        own = Tokenizer.from_str(tokenizer.to_str())  # its settings are changed below
        own.no_padding()
        own.no_truncation()
        before, after = templates.document.split(IMAGE_TOKEN)
        self._before, self._after = _ids(own, before), _ids(own, after)
        before, self._query, after = _around_slot(own, templates.query)
        self._before_query, self._after_query = _ids(own, before), _ids(own, after)
        # what a user types is text, even where it spells a special token
        own.encode_special_tokens = True
        self._tokenizer = own

    @property
    def num_before_image(self) -> int:
        """Tokens of a document that stand before its visual tokens."""
        return len(self._before)

    def query_ids(self, queries: Sequence[str]) -> list[list[int]]:
        """Token ids of each query: template, then augmentation tokens."""
        texts = [self._query.replace(QUERY_SLOT, query) for query in queries]
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        behind = self._after_query + self._suffix
        return [self._before_query + encoding.ids + behind for encoding in encoded]

    def document_ids(
        self, num_visual_tokens: Sequence[int], clips: Collection[int] = ()
    ) -> list[list[int]]:
        """Token ids of documents with so many visual tokens each; `clips` are the rows of video.

        Raises:
            CheckpointError: there is a clip, and the tokenizer has no token for it.
        """
        image = self.image_token_id
        video = _special_id(self._tokenizer, VIDEO_TOKEN) if clips else image
        return [
            self._before + [video if row in clips else image] * count + self._after
            for row, count in enumerate(num_visual_tokens)
        ]


def _around_slot(tokenizer: Tokenizer, template: str) -> tuple[str, str, str]:
    """A query template in three: up to a special token, the text with the slot, and the rest."""
    added = tokenizer.get_added_tokens_decoder().values()
    special = "|".join(re.escape(token.content) for token in added if token.special)
    pieces = re.split(f"({special})", template)
    (slot,) = (place for place, piece in enumerate(pieces) if QUERY_SLOT in piece)
    return "".join(pieces[:slot]), pieces[slot], "".join(pieces[slot + 1 :])


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _special_id(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise CheckpointError(
            f"the tokenizer has no token {token!r}, which templates and clips need"
        )
    return index
