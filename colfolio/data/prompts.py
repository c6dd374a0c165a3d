"""Templates to token ids: what the model reads around a query, an image and a clip's frames."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field
from tokenizers import Tokenizer

from colfolio.config import Settings
from colfolio.errors import CheckpointError

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
QUERY_SLOT, SECONDS_SLOT = "{query}", "{seconds}"


class Templates(Settings):
    """The strings around a query and around an image, as a checkpoint was trained with them.

    Args:
        query: holds `{query}` once.
        query_suffix: an augmentation token (query expansion of ColBERT), put behind the query
            `num_query_suffix` times.
        document: holds `<|image_pad|>` once; it is repeated once a visual token. Around a clip it
            is the same, with `<|video_pad|>` in that place.
        time_stamp: put before each temporal step of a clip, which then stands between vision marks
            of its own; holds `{seconds}` once, the time in the middle of the step with one decimal.
            Empty: a clip is one run of tokens, and no text says its times.
    """

    query: str = QUERY_SLOT
    query_suffix: str = "<|endoftext|>"
    num_query_suffix: int = Field(default=10, ge=0)
    document: str = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "Describe the image.<|im_end|><|endoftext|>"
    )
    time_stamp: str = ""


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
        self._stamps = _TimeStamps.of(own, templates) if templates.time_stamp else None
        before, self._query, after = _around_slot(own, templates.query, QUERY_SLOT)
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
        self, num_visual_tokens: Sequence[int], clips: Mapping[int, Sequence[float]] | None = None
    ) -> list[list[int]]:
        """Token ids of documents with so many visual tokens each.

        Args:
            clips: of each row of video the seconds at which its temporal steps are shown.

        Raises:
            CheckpointError: there is a clip, and the tokenizer has no token for it.
        """
        clips = clips or {}
        video = _special_id(self._tokenizer, VIDEO_TOKEN) if clips else self.image_token_id
        return [
            self._clip_ids(clips[row], [video] * count)
            if row in clips
            else self._before + [self.image_token_id] * count + self._after
            for row, count in enumerate(num_visual_tokens)
        ]

    def _clip_ids(self, seconds: Sequence[float], placeholders: list[int]) -> list[int]:
        if self._stamps is None:
            return self._before + placeholders + self._after
        size = len(placeholders) // len(seconds)
        encoded = self._tokenizer.encode_batch(
            self._stamps.texts(seconds), add_special_tokens=False
        )
        ids = list(self._stamps.before)
        for number, stamp in enumerate(encoded):
            ids += [self._stamps.end] if number else []
            ids += [*stamp.ids, self._stamps.start, *placeholders[:size]]
        return ids + self._after


@dataclass(frozen=True, slots=True)
class _TimeStamps:
    """What stands before the temporal steps of a clip and between them.

    Args:
        before: ids of what stands before the first time stamp, up to a special token.
        first, later: texts with a slot for the time: before the first step, and between steps.
        start, end: the vision marks around each step.
    """

    before: list[int]
    first: str
    later: str
    start: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, templates: Templates) -> _TimeStamps:
        """Those of templates.

        Raises:
            CheckpointError: a slot or a mark is missing, or the stamp holds a special token.
        """
        stamp = templates.time_stamp
        around = VISION_START + IMAGE_TOKEN + VISION_END
        is_plain = stamp.count(SECONDS_SLOT) == 1 and _around_slot(
            tokenizer, stamp, SECONDS_SLOT
        ) == ("", stamp, "")
        if not is_plain or around not in templates.document:
            raise CheckpointError(
                f"templates: a time stamp needs {SECONDS_SLOT} once and no special token, and a "
                f"document whose clips have them needs {around}, received {stamp!r} and "
                f"{templates.document!r}"
            )
        before, _ = templates.document.split(around)
        opening, first, _ = _around_slot(tokenizer, before + stamp, SECONDS_SLOT)
        start, end = (_special_id(tokenizer, mark) for mark in (VISION_START, VISION_END))
        return cls(_ids(tokenizer, opening), first, stamp, start, end)

    def texts(self, seconds: Sequence[float]) -> list[str]:
        """The text before each step."""
        texts = [self.first, *[self.later] * (len(seconds) - 1)]
        return [
            text.replace(SECONDS_SLOT, f"{time:.1f}")
            for text, time in zip(texts, seconds, strict=True)
        ]


def _around_slot(tokenizer: Tokenizer, template: str, slot: str) -> tuple[str, str, str]:
    """A template in three: up to a special token, the text with the slot, and the rest.

    Raises:
        CheckpointError: the tokenizer has no special tokens, or one takes a part of the slot.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    special = "|".join(re.escape(token.content) for token in added if token.special)
    if not special:
        raise CheckpointError(
            f"the tokenizer has no special tokens, so {IMAGE_TOKEN} and all others of the "
            "templates would be text; take the one that the model was trained with"
        )
    pieces = re.split(f"({special})", template)
    places = [number for number, piece in enumerate(pieces) if slot in piece]
    if len(places) != 1:
        raise CheckpointError(
            f"templates: special tokens of the tokenizer leave no {slot} in {template!r}, but "
            f"{[piece for piece in pieces if piece]}"
        )
    (place,) = places
    return "".join(pieces[:place]), pieces[place], "".join(pieces[place + 1 :])


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _special_id(tokenizer: Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise CheckpointError(
            f"the tokenizer has no token {token!r}, which templates and clips need"
        )
    return index
