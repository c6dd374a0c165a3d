import numpy as np
import pytest
import torch
from conversing import generator_of

from colfolio.batch import UNLABELLED, TextBatch
from colfolio.data.chat import ChatCollator, ChatTemplates
from colfolio.data.video import Clip
from colfolio.errors import CheckpointError

TEXTS = ["where?", "left", "right down"]


@pytest.fixture(scope="module")
def chat(tiny_shape_of):
    return generator_of(tiny_shape_of("qwen2_vl"), texts=TEXTS).chat


@pytest.fixture
def clip(random_image):
    return Clip(np.stack([random_image(56, 28, seed) for seed in range(4)]), 0.5)


def text_of(chat, packed, row):
    """The tokens of a row as text; the tiny tokenizer puts a space before the first word."""
    ids = packed.token_ids[int(packed.offsets[row]) : int(packed.offsets[row + 1])].tolist()
    tokenizer = chat.collator.prompter._tokenizer
    return tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "")


def test_a_row_is_written_as_qwen2_vl_was_trained(chat, random_image, clip):
    batch = chat.conversations(
        [random_image(56, 84), clip], ["where?", "where?"], ["left", "right"], [7, 3]
    )
    before = "<|im_start|>system\nyouareahelpfulassistant.<|im_end|>\n<|im_start|>user\n"
    for row, (visual, answer) in enumerate(
        [("<|image_pad|>" * 6, "left"), ("<|video_pad|>" * 4, "right")]
    ):
        asked = f"<|vision_start|>{visual}<|vision_end|>where?<|im_end|>\n"
        expected = f"{before}{asked}<|im_start|>assistant\n{answer}<|im_end|>"
        assert text_of(chat, batch.inputs, row) == expected
    assert batch.row_ids.tolist() == [7, 3]


def test_qwen3_vl_reads_no_system_message_and_times_before_steps(tiny_shape_of, random_image):
    chat = generator_of(tiny_shape_of("qwen3_vl"), texts=TEXTS).chat
    clip = Clip(np.stack([random_image(64, 32, seed) for seed in range(4)]), 0.5)
    written = text_of(chat, chat.prompts([clip], ["where?"]), 0)
    steps = [
        f"<{seconds}seconds><|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
        for seconds in (0.2, 1.2)
    ]
    assert written == (
        f"<|im_start|>user\n{steps[0]}{steps[1]}where?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_labels_are_the_answer_and_its_end_one_place_before(chat, random_image, clip):
    answers = ["left", "right down right down"]
    batch = chat.conversations([random_image(28, 28), clip], ["where?", "a"], answers, [0, 1])
    ids, offsets = batch.inputs.token_ids, batch.inputs.offsets.tolist()
    for row, count in enumerate(chat.num_answer_tokens(answers)):
        end = offsets[row + 1]
        assert batch.labels[end - count - 1 : end - 1].tolist() == ids[end - count : end].tolist()
        assert batch.labels[end - 2] == chat.end_token_id
        assert (batch.labels[offsets[row] : end - count - 1] == UNLABELLED).all()
        assert batch.labels[end - 1] == UNLABELLED
    assert batch.num_labels == sum(chat.num_answer_tokens(answers))


def test_a_prompt_is_its_conversation_up_to_the_answer(chat, random_image):
    image = random_image(56, 56)
    whole = chat.conversations([image], ["where?"], ["left"], [0]).inputs
    prompt = chat.prompts([image], ["where?"])
    length = len(prompt.token_ids)
    assert torch.equal(whole.token_ids[:length], prompt.token_ids)
    assert torch.equal(whole.position_ids[:, :length], prompt.position_ids)
    assert length + chat.num_answer_tokens(["left"])[0] == len(whole.token_ids)


def test_text_behind_what_is_seen_goes_on_where_its_positions_end(chat, random_image):
    positions = chat.prompts([random_image(28, 224)], ["where?"]).position_ids
    is_visual = chat.prompts([random_image(28, 224)], ["where?"]).token_ids == (
        chat.collator.prompter.image_token_id
    )
    last = int(is_visual.nonzero().max())
    assert positions[:, last + 1].tolist() == [int(positions[:, : last + 1].max()) + 1] * 3


def test_special_tokens_that_people_write_are_text(chat, random_image):
    image = random_image(28, 28)
    batch = chat.conversations([image], ["<|im_end|>"], ["<|image_pad|> <|im_end|>"], [0])
    ids = batch.inputs.token_ids
    assert (ids == chat.collator.prompter.image_token_id).sum() == 1
    assert (ids == chat.end_token_id).sum() == 3


def test_rows_of_a_batch_keep_their_labels(chat, random_image, clip):
    batch = chat.conversations(
        [random_image(28, 28), clip, random_image(56, 28)], ["a"] * 3, TEXTS, [5, 6, 7]
    )
    parts = [batch.rows(0, 1), batch.rows(1, 3)]
    assert torch.cat([part.labels for part in parts]).tolist() == batch.labels.tolist()
    assert torch.cat([part.row_ids for part in parts]).tolist() == [5, 6, 7]
    assert [len(part) for part in parts] == [1, 2]


def test_a_batch_of_no_rows_has_no_labels(chat):
    batch = chat.conversations([], [], [], [])
    assert (len(batch), batch.num_labels) == (0, 0)


def test_labels_that_fit_no_row_are_refused(chat, random_image):
    batch = chat.conversations([random_image(28, 28)], ["a"], ["left"], [0])
    with pytest.raises(ValueError, match="need as many ids and labels"):
        TextBatch(batch.inputs, batch.labels[1:], batch.row_ids)
    shifted = batch.labels.roll(1)
    with pytest.raises(ValueError, match="none of its row follows"):
        TextBatch(batch.inputs, shifted, batch.row_ids)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "no slot"}, "{question} once"),
        ({"visual": "no image"}, r"<\|image_pad\|> once"),
        ({"end": "<|no_such|>"}, r"no token '<\|no_such\|>'"),
    ],
)
def test_templates_without_their_slots_are_refused(chat, tiny_tokenizer, values, message):
    templates = ChatTemplates.model_validate(values)
    with pytest.raises(CheckpointError, match=message):
        ChatCollator(tiny_tokenizer, templates, chat.collator.budget)
