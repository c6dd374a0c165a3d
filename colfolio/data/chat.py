"""Questions about images and clips, and their answers, to packed inputs with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from tokenizers import Tokenizer

from colfolio.batch import UNLABELLED, Packed, TextBatch
from colfolio.config import Settings
from colfolio.data.collate import Collator, Pixels
from colfolio.data.patches import PixelBudget
from colfolio.data.prompts import IMAGE_TOKEN, QUERY_SLOT, Prompter, Templates
from colfolio.data.video import Clip
from colfolio.errors import CheckpointError

QUESTION_SLOT = "{question}"


class ChatTemplates(Settings):
    """The strings of a conversation of one turn, as Qwen2-VL and Qwen2.5-VL were trained with them.

    Args:
        visual: up to the question; holds `<|image_pad|>` once, as `Templates.document` does.
        question: holds `{question}` once, and ends where the answer begins.
        end: the special token that ends an answer, and is learnt with it.
        time_stamp: as in `Templates`.
    """

    visual: str = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    )
    question: str = "{question}<|im_end|>\n<|im_start|>assistant\n"
    end: str = "<|im_end|>"
    time_stamp: str = ""


class ChatCollator:
    """Packs conversations for one checkpoint.

    Question and answer are cut into tokens each for itself, as they are when the answer is not
    known yet; special tokens that they spell are text.

    Args:
        position_scheme: as of `Collator`.

    Raises:
        CheckpointError: a template lacks its slot, or the tokenizer a special token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        templates: ChatTemplates,
        budget: PixelBudget,
        position_scheme: str | Mapping[str, Any] = "qwen2_vl",
    ) -> None:
        if templates.question.count(QUESTION_SLOT) != 1 or templates.visual.count(IMAGE_TOKEN) != 1:
            raise CheckpointError(
                f"templates: the question needs {QUESTION_SLOT} once and what is seen "
                f"{IMAGE_TOKEN} once, received {templates.question!r} and {templates.visual!r}"
            )
        asked = templates.question.replace(QUESTION_SLOT, QUERY_SLOT)
        prompter = _prompter(tokenizer, asked, templates)
        self.collator = Collator(prompter, budget, position_scheme)
        self._answers = _prompter(tokenizer, QUERY_SLOT + templates.end, templates)
        end = tokenizer.token_to_id(templates.end)
        assert end is not None, "a prompter refuses a tokenizer without it"
        self.end_token_id: int = end

    def prompts(
        self,
        visuals: Sequence[Pixels | Clip],
        questions: Sequence[str],
        begun: Sequence[list[int]] | None = None,
    ) -> Packed:
        """One row a question about what is seen; its answer comes next.

        Args:
            begun: token ids of the part of each answer that is known.
        """
        asked = self.collator.prompter.query_ids(questions)
        known = begun or [[]] * len(asked)
        behind = [[*row, *more] for row, more in zip(asked, known, strict=True)]
        return self.collator.documents(visuals, behind)

    def conversations(
        self,
        visuals: Sequence[Pixels | Clip],
        questions: Sequence[str],
        answers: Sequence[str],
        row_ids: Sequence[int],
    ) -> TextBatch:
        """One row a conversation; labels are its answer and the token that ends it."""
        told = self._answers.query_ids(answers)
        inputs = self.prompts(visuals, questions, told)
        labels = [
            _labels(int(length), row) for length, row in zip(inputs.lengths, told, strict=True)
        ]
        return TextBatch(
            inputs,
            torch.tensor(list(chain.from_iterable(labels)), dtype=torch.int64),
            torch.tensor(row_ids, dtype=torch.int64),
        )

    def num_answer_tokens(self, answers: Sequence[str]) -> list[int]:
        """Tokens of each answer, its end included."""
        return [len(ids) for ids in self._answers.query_ids(answers)]


def _prompter(tokenizer: Tokenizer, text: str, templates: ChatTemplates) -> Prompter:
    """Cuts a text with a slot as a retriever's queries are cut, and what is seen as documents."""
    return Prompter(
        tokenizer,
        Templates(
            query=text,
            query_suffix=templates.end,
            num_query_suffix=0,
            document=templates.visual,
            time_stamp=templates.time_stamp,
        ),
    )


def _labels(length: int, answer: list[int]) -> list[int]:
    """Of a row of so many tokens that ends in an answer: each place tells the one behind it."""
    return [UNLABELLED] * (length - len(answer) - 1) + answer + [UNLABELLED]
