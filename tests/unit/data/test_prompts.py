import json

import pytest
from tokenizers import Tokenizer

from colfolio.data.prompts import Prompter, Templates
from colfolio.errors import CheckpointError


@pytest.fixture
def prompter(tiny_tokenizer):
    return Prompter(tiny_tokenizer, Templates(query="find {query} now", num_query_suffix=3))


def test_a_query_stands_in_its_template_with_augmentation_tokens_behind(prompter, tiny_tokenizer):
    (ids,) = prompter.query_ids(["red"])
    end = tiny_tokenizer.token_to_id("<|endoftext|>")
    assert ids == tiny_tokenizer.encode("find red now").ids + [end] * 3


def test_a_document_repeats_its_placeholder_once_a_visual_token(prompter, tiny_tokenizer):
    one, five = prompter.document_ids([1, 5])
    placeholder = tiny_tokenizer.token_to_id("<|image_pad|>")
    assert (one.count(placeholder), five.count(placeholder)) == (1, 5)
    first = prompter.num_before_image
    assert five[first : first + 5] == [placeholder] * 5
    assert one[:first] + one[first + 1 :] == five[:first] + five[first + 5 :]


def test_the_document_template_is_encoded_as_a_whole_would_be(tiny_tokenizer):
    templates = Templates()
    (ids,) = Prompter(tiny_tokenizer, templates).document_ids([1])
    assert ids == tiny_tokenizer.encode(templates.document).ids


@pytest.mark.parametrize(
    "text", ["<|image_pad|>", "what is <|image_pad|>?", "a<|im_end|><|video_pad|>"]
)
def test_a_query_that_spells_a_special_token_is_plain_text(prompter, tiny_tokenizer, text):
    (ids,) = prompter.query_ids([text])
    special = {
        tiny_tokenizer.token_to_id(t) for t in ("<|image_pad|>", "<|im_end|>", "<|video_pad|>")
    }
    assert not special & set(ids)
    assert len(set(map(tuple, prompter.query_ids([text, "what is image_pad?"])))) == 2


def test_special_tokens_of_the_query_template_stay_special(tiny_tokenizer):
    template = "<|im_start|>search: {query}<|im_end|> now"
    (ids,) = Prompter(tiny_tokenizer, Templates(query=template, num_query_suffix=0)).query_ids(
        ["red"]
    )
    assert ids == tiny_tokenizer.encode("<|im_start|>search: red<|im_end|> now").ids


def test_a_query_with_the_slot_in_its_text_is_put_in_once(prompter, tiny_tokenizer):
    (ids,) = prompter.query_ids(["{query}"])
    assert ids[:-3] == tiny_tokenizer.encode("find {query} now").ids


def test_no_queries_give_no_rows(prompter):
    assert prompter.query_ids([]) == []
    assert prompter.document_ids([]) == []


@pytest.mark.parametrize(
    "templates",
    [
        Templates(query="no slot"),
        Templates(query="{query} {query}"),
        Templates(document="no image"),
        Templates(document="<|image_pad|><|image_pad|>"),
    ],
)
def test_a_template_needs_its_slot_exactly_once(tiny_tokenizer, templates):
    with pytest.raises(CheckpointError, match="once"):
        Prompter(tiny_tokenizer, templates)


def test_a_token_that_the_tokenizer_lacks_is_named(tiny_tokenizer):
    with pytest.raises(CheckpointError, match=r"no token '<\|nothing\|>'"):
        Prompter(tiny_tokenizer, Templates(query_suffix="<|nothing|>"))


def test_a_negative_number_of_augmentation_tokens_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Templates(num_query_suffix=-1)


def test_padding_and_truncation_that_a_tokenizer_was_saved_with_are_not_used(tiny_tokenizer):
    from tokenizers import Tokenizer

    fixed = Tokenizer.from_str(tiny_tokenizer.to_str())
    fixed.enable_padding(length=64)
    fixed.enable_truncation(3)
    texts = ["a", "a long text of many words"]
    mine, plain = (Prompter(each, Templates()) for each in (fixed, tiny_tokenizer))
    assert mine.query_ids(texts) == plain.query_ids(texts)
    assert mine.document_ids([2]) == plain.document_ids([2])


def test_the_tokenizer_that_came_in_is_left_as_it_was(tiny_tokenizer):
    before = tiny_tokenizer.to_str()
    Prompter(tiny_tokenizer, Templates()).query_ids(["a"])
    assert tiny_tokenizer.to_str() == before
    placeholder = tiny_tokenizer.token_to_id("<|image_pad|>")
    assert tiny_tokenizer.encode("<|image_pad|>").ids == [placeholder]


def without_special_tokens(tokenizer):
    values = json.loads(tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(values | {"added_tokens": []}))


def test_a_tokenizer_without_special_tokens_is_refused(tiny_tokenizer):
    with pytest.raises(CheckpointError, match="no special tokens"):
        Prompter(without_special_tokens(tiny_tokenizer), Templates())


def test_a_special_token_that_takes_a_part_of_the_slot_is_refused(tiny_tokenizer):
    own = Tokenizer.from_str(tiny_tokenizer.to_str())
    own.add_special_tokens(["{que"])
    with pytest.raises(CheckpointError, match=r"leave no \{query\} in '\{query\}'"):
        Prompter(own, Templates())
