"""Templates as a chat template of `transformers`, and the templates that such a one holds."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from colfolio.data.prompts import IMAGE_TOKEN, QUERY_SLOT, Templates
from colfolio.errors import TemplatesError

CHAT_FILE = "chat_template.jinja"
_TEXT = {"type": "text", "text": QUERY_SLOT}
_IMAGE = {"type": "image", "image": "image"}


def chat_template(templates: Templates) -> str:
    """A Jinja template that writes a text as a query and an image as a document.

    A system message (the prompt of sentence-transformers) is written as it is, before both.
    """
    before, after = whole_query(templates).split(QUERY_SLOT)
    return (
        "{%- for message in messages %}{%- for part in message.content %}"
        "{%- if message.role == 'system' %}{{- part.text }}"
        f"{{%- elif part.type == 'image' %}}{{{{- {_quoted(templates.document)} }}}}"
        f"{{%- else %}}{{{{- {_quoted(before)} + part.text + {_quoted(after)} }}}}"
        "{%- endif %}{%- endfor %}{%- endfor %}"
    )


def whole_query(templates: Templates) -> str:
    """A query's string wholly, augmentation tokens too, with its slot."""
    return templates.query + templates.query_suffix * templates.num_query_suffix


def templates_of(
    query: str, document: str, special: Collection[str], origin: str, time_stamp: str = ""
) -> Templates:
    """Templates of a query's and a page's whole string; a special token repeated at the end of the
    query is what augments it.

    Args:
        special: tokens of the tokenizer that stand for themselves.

    Raises:
        TemplatesError: a string lacks its slot.
    """
    for string, slot in ((query, QUERY_SLOT), (document, IMAGE_TOKEN)):
        if string.count(slot) != 1:
            raise TemplatesError(f"{origin}: {string!r} must hold {slot} once")
    names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    at_end = re.search(rf"({names})\1*$", query) if names else None
    if at_end is None:
        return Templates(query=query, num_query_suffix=0, document=document, time_stamp=time_stamp)
    return Templates(
        query=query[: at_end.start()],
        query_suffix=at_end[1],
        num_query_suffix=len(at_end[0]) // len(at_end[1]),
        document=document,
        time_stamp=time_stamp,
    )


def rendered(template: str, origin: str, prompts: dict[str, str], **values: Any) -> tuple[str, str]:
    """What a chat template writes around a query and around a page.

    Args:
        prompts: what is put before a `query` and a `document`, as a system message.
        values: further ones that the template may read.

    Raises:
        TemplatesError: the template cannot be run.
    """
    pieces = []
    for task, part in (("query", _TEXT), ("document", _IMAGE)):
        messages = [{"role": "user", "content": [part]}]
        if prompts.get(task):
            system = {"type": "text", "text": prompts[task]}
            messages = [{"role": "system", "content": [system]}, *messages]
        try:
            texts, _ = render_jinja_template(
                conversations=[messages], chat_template=template, task=task, **values
            )
        except Exception as error:  # whatever a foreign template runs into
            raise TemplatesError(f"{origin}: its chat template cannot be run: {error}") from None
        pieces.append(texts[0])
    return pieces[0], pieces[1]


def _quoted(text: str) -> str:
    """A Jinja string; its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
