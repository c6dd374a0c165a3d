"""The strings and the pixels that other libraries' files say, and what those files cannot say."""

import pytest
from exports import change
from hypothesis import given
from hypothesis import strategies as st

from colfolio.data.patches import PixelBudget
from colfolio.data.prompts import IMAGE_TOKEN, Templates
from colfolio.errors import CheckpointError
from colfolio.models.families import FAMILIES
from colfolio.models.formats.chat import chat_template, rendered, templates_of, whole_query
from colfolio.models.formats.images import pixel_budget_of, write_processor_files

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@given(
    before=st.text("Que: \n\\\"'{}%é漢🙂", max_size=8),
    after=st.text("ab \n\\\"'%", max_size=5),
    suffix=st.sampled_from(SPECIAL),
    count=st.integers(1, 12),
    page=st.text("Describe\n\\\"'{}%é", max_size=8),
)
def test_templates_survive_a_chat_template(before, after, suffix, count, page):
    templates = Templates(
        query=before + "{query}" + after,
        query_suffix=suffix,
        num_query_suffix=count,
        document=page + IMAGE_TOKEN + page,
    )
    query, document = rendered(chat_template(templates), "test", {})
    assert query == whole_query(templates)
    assert templates_of(query, document, SPECIAL, "test") == templates


def test_a_prompt_stands_before_what_a_chat_template_writes():
    template = chat_template(Templates())
    query, document = rendered(template, "test", {"query": "find: ", "document": "page: "})
    assert query.startswith("find: {query}<|endoftext|>")
    assert document.startswith("page: <|im_start|>user")


def test_a_query_without_a_special_token_at_its_end_has_no_augmentation():
    templates = templates_of("<|im_start|>{query}\n", IMAGE_TOKEN, SPECIAL, "test")
    assert (templates.query, templates.num_query_suffix) == ("<|im_start|>{query}\n", 0)


@pytest.mark.parametrize("pair", [("no slot", IMAGE_TOKEN), ("{query}", "no image")])
def test_strings_without_a_slot_are_refused(pair):
    with pytest.raises(CheckpointError, match=r"no (slot|image)"):
        templates_of(*pair, SPECIAL, "test")


def tiny_config():
    return FAMILIES["qwen2_vl"].config()


@pytest.mark.parametrize("budget", [PixelBudget(), FAMILIES["qwen3_vl"].pixel_budget])
def test_a_pixel_budget_survives_processor_files(budget, tmp_path):
    write_processor_files(budget, "qwen2_vl", tmp_path, "Qwen2VLProcessor")
    assert pixel_budget_of(tmp_path, tiny_config()) == (budget, [])


@pytest.mark.parametrize(
    "values",
    [
        {"min_pixels": 784, "max_pixels": 7840},
        {"size": {"shortest_edge": 784, "longest_edge": 7840}},
        {"size": {"min_pixels": 784, "max_pixels": 7840}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 784, "max_pixels": 7840},
    ],
)
def test_limits_are_read_in_every_form_they_are_written_in(values, tmp_path):
    change(tmp_path / "preprocessor_config.json", **values)
    budget, assumed = pixel_budget_of(tmp_path, tiny_config())
    assert (budget.min_pixels, budget.max_pixels) == (784, 7840)
    assert len(assumed) == 1
    assert "patch_size 14" in assumed[0]


def test_the_processors_own_file_comes_first_as_in_transformers(tmp_path):
    change(tmp_path / "preprocessor_config.json", max_pixels=7840)
    change(tmp_path / "processor_config.json", image_processor={"max_pixels": 78400})
    assert pixel_budget_of(tmp_path, tiny_config())[0].max_pixels == 78400
    assert pixel_budget_of(tmp_path, tiny_config(), {"max_pixels": 784000})[0].max_pixels == 784000


def test_no_processor_file_is_said_and_the_familys_budget_taken(tmp_path):
    budget, assumed = pixel_budget_of(tmp_path, tiny_config())
    assert budget == FAMILIES["qwen2_vl"].pixel_budget
    assert "602,112" in assumed[0]


@pytest.mark.parametrize(
    "values",
    [
        {"do_resize": False},
        {"do_normalize": False},
        {"do_rescale": False},
        {"resample": 2},
        {"rescale_factor": 1.0},
        {"max_pixels": "many"},
        {"max_pixels": 1},
        {"image_mean": [0.5]},
    ],
)
def test_images_that_enter_otherwise_are_refused(values, tmp_path):
    path = tmp_path / "preprocessor_config.json"
    change(path, **values)
    with pytest.raises(CheckpointError, match=path.name):
        pixel_budget_of(tmp_path, tiny_config())
