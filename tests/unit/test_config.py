from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, Field, model_validator

from colfolio.config import (
    Settings,
    line_of,
    load_settings,
    naming_lines,
    to_yaml,
    validated,
)
from colfolio.errors import ColfolioError, RecipeError


class Inner(Settings):
    lr: float = Field(default=1.0, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)


class Recipe(Settings):
    name: str
    steps: int = 3
    split: str | None = "validation"
    inner: Inner = Inner()
    weights: dict[str, float] = Field(default_factory=dict)


class Bounds(Settings):
    least: int
    most: int

    @model_validator(mode="after")
    def _is_range(self):
        if self.least > self.most:
            raise ValueError(f"least {self.least} is more than most {self.most}")
        return self


class Stages(Settings):
    stages: tuple[Bounds, ...] = ()


def _in_capitals(text):
    if not text.isupper():
        raise ValueError(f"{text!r} is not in capitals")
    return text


class Switch(Settings):
    is_on: bool = False


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_recipe_is_read_with_its_defaults(write):
    recipe = load_settings(write("name: a\ninner: {lr: 0.5}"), Recipe)
    assert recipe == Recipe(name="a", inner=Inner(lr=0.5))


def test_settings_written_as_yaml_read_back_equal(write):
    recipe = Recipe(name="Größe: 1", split=None, inner=Inner(lr=3e-4), weights={"words": 0.5})
    assert load_settings(write(to_yaml(recipe)), Recipe) == recipe


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1E+2", 100.0), ("2.5e-1", 0.25), ("1_0e1", 100.0)]
)
def test_an_exponent_without_a_point_is_a_number(write, text, value):
    assert load_settings(write(f"name: a\ninner: {{lr: {text}}}"), Recipe).inner.lr == value
    assert load_settings(write("name: a"), Recipe, [f"inner.lr={text}"]).inner.lr == value


def test_overrides_replace_values_at_any_depth(write):
    path = write("name: a\nsteps: 1")
    overrides = ["steps=7", "inner.betas=[0.5, 0.6]", "split=null", "weights.words=2", "name=b=c"]
    recipe = load_settings(path, Recipe, overrides)
    assert (recipe.steps, recipe.inner.betas, recipe.split) == (7, (0.5, 0.6), None)
    assert recipe.weights == {"words": 2.0}
    assert recipe.name == "b=c"


def test_an_override_does_not_reach_the_next_reading(write):
    path = write("name: a")
    load_settings(path, Recipe, ["inner.lr=9"])
    assert load_settings(path, Recipe).inner.lr == 1.0


@pytest.mark.parametrize("override", ["steps", "=3", ""])
def test_an_override_without_key_and_value_is_refused(write, override):
    with pytest.raises(RecipeError, match="expected key=value"):
        load_settings(write("name: a"), Recipe, [override])


def test_an_override_below_a_value_is_refused(write):
    with pytest.raises(RecipeError, match="'steps' holds a value"):
        load_settings(write("name: a\nsteps: 1"), Recipe, ["steps.more=1"])


def test_an_override_that_is_no_yaml_names_itself(write):
    with pytest.raises(RecipeError, match=r"weights=\{a: 1"):
        load_settings(write("name: a"), Recipe, ["weights={a: 1"])


def test_every_unknown_key_is_named_with_its_path(write):
    with pytest.raises(RecipeError, match=r"recipe\.yaml.*'inner\.learning_rate'.*'nam'"):
        load_settings(write("nam: a\nname: b\ninner: {learning_rate: 1}"), Recipe)
    with pytest.raises(RecipeError, match=r"unknown key 'inner\.rate'"):
        load_settings(write("name: a"), Recipe, ["inner.rate=1"])


def test_an_unknown_key_is_told_with_the_one_that_is_like_it_or_with_all_that_there_are(write):
    with pytest.raises(RecipeError, match=r"unknown key 'stepps' \(did you mean 'steps'\?\)"):
        load_settings(write("name: a\nstepps: 1"), Recipe)
    with pytest.raises(RecipeError, match=r"unknown key 'inner\.speed' \(known are betas, lr\)"):
        load_settings(write("name: a\ninner: {speed: 1}"), Recipe)
    with pytest.raises(RecipeError, match=r"unknown key 'stages\.0\.leats' \(did you mean 'least'"):
        validated({"stages": [{"leats": 1}]}, Stages, "recipe")


def test_a_key_given_twice_is_refused(write):
    with pytest.raises(RecipeError, match=r"'steps'.*twice"):
        load_settings(write("name: a\nsteps: 1\nsteps: 2"), Recipe)


@pytest.mark.parametrize(
    ("line", "key"),
    [("steps: many", "steps"), ("inner: {lr: -1}", "inner.lr"), ("inner: 3", "inner")],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_key(write, line, key):
    with pytest.raises(RecipeError, match=f"{key}: "):
        load_settings(write(f"name: a\n{line}"), Recipe)


def test_a_fault_says_what_was_received_and_nothing_of_its_library(write):
    with pytest.raises(RecipeError, match=r"inner\.lr: Input should be greater than 0, not -1$"):
        load_settings(write("name: a\ninner: {lr: -1}"), Recipe)
    with pytest.raises(RecipeError, match=r"recipe\.yaml: recipe: least 3 is more than most 2$"):
        load_settings(write("least: 3\nmost: 2"), Bounds)


class Whole(Settings):
    count: int = 1
    size: float = 1.0
    is_on: bool = False
    which: Literal["none"] | int = "none"
    pair: tuple[float, float] = (0.0, 0.0)
    named: dict[str, float] = Field(default_factory=dict)
    open: tuple[Annotated[str, AfterValidator(_in_capitals)], ...] = ("A",)
    some: Annotated[tuple[Annotated[str, AfterValidator(_in_capitals)], ...], Field(min_length=1)]
    anything: dict[str, Any] = Field(default_factory=dict)
    inner: Inner = Inner()
    switch: Switch = Switch()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("some: [a]", r"some\.0: 'a' is not in capitals$"),  # said once, and no length beside it
        ("some: []", r"some: List should have at least 1 item after validation, not 0$"),
        ("some: [A]\nopen: [A, b]", r"open\.1: 'b' is not in capitals$"),
        ("some: A", r"some: Input should be a list, not 'A'$"),
        ("some: [A]\npair: [1]", r"pair\.1: Field required$"),
        (
            "some: [A]\npair: [1, 2, 3]",
            r"pair: List should have at most 2 items after validation, not 3$",
        ),
        ("some: [A]\ninner: 3", r"inner: Input should be a mapping of keys to values, not 3$"),
        (
            "some: [A]\nwhich: all",
            r"which: Input should be 'none', or Input should be a valid integer, unable to parse "
            r"string as an integer, not 'all'$",
        ),
    ],
)
def test_a_fault_is_told_once(write, line, told):
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+: " + told) as caught:
        load_settings(write(line), Whole)
    assert str(caught.value).count("recipe.yaml") == 1


@pytest.mark.parametrize(
    "line",
    [
        "count: true",
        "size: yes",
        "which: false",
        "pair: [1, on]",
        "named: {a: true}",
        "inner: {lr: true}",
    ],
)
def test_true_and_false_are_no_numbers(write, line):
    with pytest.raises(RecipeError, match=r"recipe\.yaml:1: .*, and takes neither true nor false$"):
        load_settings(write(f"{line}\nsome: [A]"), Whole)


def test_true_and_false_are_kept_where_they_are_meant(write):
    text = "some: [A]\nis_on: true\nanything: {a: [true]}\nswitch: {is_on: yes}"
    found = load_settings(write(text), Whole)
    assert found.is_on
    assert found.switch.is_on
    assert found.anything == {"a": [True]}
    assert Whole.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("name: a\nopen: [norm, layers[0:14]]", 2, "layers[0:14]"),
        ("open: [layers[top 25%], norm]", 1, "layers[top 25%]"),
        ("a: 1\nopen: [\n  vision,\n  layers[4:],\n]", 4, "layers[4:]"),
        ("inner: {open: layers[3]}", 1, "layers[3]"),
    ],
)
def test_brackets_between_brackets_are_told_to_stand_in_quotes(write, text, line, word):
    told = f'recipe.yaml:{line}: {word} has brackets; .* in quotes, "{word}"'
    pattern = told.translate(str.maketrans({"[": r"\[", "]": r"\]"}))
    with pytest.raises(RecipeError, match=pattern):
        load_settings(write(text), Recipe)
    with pytest.raises(RecipeError, match=r"override 'open=.*: layers\[4\] has brackets"):
        load_settings(write("name: a"), Recipe, ["open=[norm, layers[4]]"])


RECIPE = """# a comment
name: a

inner: {betas: [0.5, 0.6],
  lr: 1}
weights:
  words: 1
stages:
- open: [norm]
  step: 3
-
  open: [layers]
"""


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("name", 2),
        ("inner", 4),
        ("inner.betas", 4),
        ("inner.lr", 5),
        ("weights.words", 7),
        ("weights.words.more", 7),
        ("weights.other", 6),
        ("stages", 8),
        ("stages.0", 9),
        ("stages.0.step", 10),
        ("stages.1.open.0", 12),
        ("stages.7", 8),
        ("none", None),
    ],
)
def test_the_line_of_a_key_is_that_of_the_deepest_that_is_there(key, line):
    assert line_of(RECIPE, key) == line


def test_a_fault_is_told_with_its_line(write):
    path = write("name: a\nsteps: 2\ninner:\n  lr: -1\nmore: 3")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:4: inner\.lr: .*\.yaml:5: unknown key"):
        load_settings(path, Recipe)


def test_a_fault_of_an_override_is_in_no_line(write):
    path = write("name: a\ninner:\n  lr: 1")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: inner\.lr: "):
        load_settings(path, Recipe, ["inner.lr=-1"])
    with pytest.raises(RecipeError, match=r"recipe\.yaml: unknown key 'inner\.rate'"):
        load_settings(path, Recipe, ["inner.rate.high=1"])
    both = write("name: a\ninner:\n  rate: {low: 1}")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: unknown key 'inner\.rate'"):
        load_settings(both, Recipe, ["inner.rate.high=1"])


def test_an_error_about_a_key_gets_the_line_of_the_recipe(write):
    path = write("name: a\ninner:\n  lr: 1\n")
    with (
        pytest.raises(RecipeError, match=r"recipe\.yaml:3: inner\.lr: is wrong$") as caught,
        naming_lines(path, "inner"),
    ):
        raise RecipeError("is wrong", "lr")
    assert "inner.lr" in str(caught.value)
    with (
        pytest.raises(RecipeError, match=r"recipe\.yaml: inner\.lr: is wrong$"),
        naming_lines(path, "inner", ["inner.lr=3"]),
    ):
        raise RecipeError("is wrong", "lr")
    with pytest.raises(RecipeError, match=r"^is wrong$"), naming_lines(path, "inner"):
        raise RecipeError("is wrong")


def test_a_missing_key_is_named(write):
    with pytest.raises(RecipeError, match="name: Field required"):
        load_settings(write("steps: 1"), Recipe)


@pytest.mark.parametrize("text", ["", "- a\n- b", "just a string", "3"])
def test_a_recipe_that_is_no_mapping_is_refused(write, text):
    with pytest.raises(RecipeError, match="mapping"):
        load_settings(write(text), Recipe)


@pytest.mark.parametrize("text", ["name: [1, 2", "name: 'a", "\tname: a", "a: !!python/object:x 1"])
def test_what_is_no_plain_yaml_is_refused_with_the_file(write, text):
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_settings(write(text), Recipe)


def test_keys_that_are_no_words_are_refused(write):
    with pytest.raises(RecipeError):
        load_settings(write("name: a\n1: 2"), Recipe)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"name: \xff\xfe\x00")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_settings(path, Recipe)


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read"):
        load_settings(tmp_path / "none.yaml", Recipe)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_settings(tmp_path, Recipe)


def test_settings_never_change():
    with pytest.raises(ValueError, match="frozen"):
        Recipe(name="a").steps = 4


def test_faults_of_plain_values_name_their_origin():
    with pytest.raises(ColfolioError, match=r"state\.json: name"):
        validated({}, Recipe, "state.json")
