import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colfolio.errors import RecipeError
from colfolio.models.parts import Inventory, Place, ranges
from colfolio.models.selectors import LAYERED, PARTS, parse_selector

COUNTS = st.integers(1, 80)
NUM_VISION, NUM_LAYERS = 4, 7


def inventory_of(num_vision, num_layers):
    """Two parameters a layer, one in each other part, without a model."""
    places = {
        f"{part}.{number}.{name}": Place(part, number, number)
        for part, count in (("vision", num_vision), ("layers", num_layers))
        for number in range(count)
        for name in ("weight", "bias")
    }
    return Inventory(places | {f"{p}.weight": Place(p, None, 0) for p in PARTS if p not in LAYERED})


PLAIN = inventory_of(NUM_VISION, NUM_LAYERS)


def layers_of(text, count):
    return list(parse_selector(text).layers(count))


@given(COUNTS, st.sampled_from(LAYERED), st.data())
def test_the_two_sides_of_a_cut_are_the_part(count, part, draw):
    found = inventory_of(count, count)
    cut = draw.draw(st.integers(1, count - 1)) if count > 1 else 1
    whole = found.select([part])
    below = found.select([f"{part}[0:{cut}]"])
    assert found.select([f"{part}[:{cut}]"]) == below
    if cut < count:
        above = found.select([f"{part}[{cut}:]"])
        assert found.select([f"{part}[{cut}:{count}]"]) == above
        assert below | above == whole
        assert not below & above
        assert found.select([f"{part}[:{cut}]", f"{part}[{cut}:]"]) == whole
    assert found.select([f"{part}[:]"]) == whole
    assert found.select([f"{part}[{n}]" for n in range(count)]) == whole


@given(COUNTS, st.data())
def test_so_many_at_the_top_and_the_rest_at_the_bottom_are_all(count, draw):
    size = draw.draw(st.integers(1, count))
    top = layers_of(f"layers[top {size}]", count)
    assert top == list(range(count - size, count))
    if size < count:
        assert layers_of(f"layers[bottom {count - size}]", count) + top == list(range(count))


@given(COUNTS, st.decimals("0.01", "100", places=2))
def test_a_share_is_rounded_up(count, share):
    size = math.ceil(Fraction(str(share)) * count / 100)
    assert layers_of(f"vision[top {share}%]", count) == list(range(count - size, count))
    assert layers_of(f"vision[bottom {share}%]", count) == list(range(size))


def test_a_third_is_33_percent():
    for count in range(3, 99, 3):
        assert len(layers_of("layers[top 33%]", count)) == count // 3
    assert layers_of("layers[top 25%]", 28) == [21, 22, 23, 24, 25, 26, 27]
    assert layers_of("layers[top 25%]", 6) == [4, 5]


@given(st.sets(st.sampled_from(sorted(PLAIN.places))))
def test_a_label_names_a_set_and_no_other(names):
    label = PLAIN.label(names)
    if not names:
        assert label == "nothing"
    elif "in part" not in label:
        assert PLAIN.select(label.split(", ")) == names
    else:
        pieces = [piece.removesuffix(" in part") for piece in label.split(", ")]
        assert PLAIN.select(pieces) > names
        whole = [piece for piece in label.split(", ") if not piece.endswith("in part")]
        assert PLAIN.select(whole) <= names


@given(
    st.lists(
        st.sampled_from(
            ["vision", "layers[2:5]", "layers[0]", "vision[top 50%]", "norm", "adapters", "merger"]
        ),
        min_size=1,
    )
)
def test_what_selectors_take_is_taken_again_by_its_label(selectors):
    names = PLAIN.select(selectors)
    label = PLAIN.label(names)
    assert "in part" not in label
    assert PLAIN.select(label.split(", ")) == names


def test_a_label_is_as_short_as_can_be():
    assert PLAIN.label(PLAIN.select(["all"])) == ", ".join(PARTS)
    some = PLAIN.select(["layers[3:]", "vision", "projection", "layers[0]"])
    assert PLAIN.label(some) == "vision, layers[0], layers[3:7], projection"
    assert PLAIN.label(["layers.2.bias", "layers.3.bias"]) == "layers[2:4] in part"
    assert ranges([]) == []


def test_a_label_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"no parameters of this model: layers\.9\.weight"):
        PLAIN.label(["layers.9.weight", "norm.weight"])


@given(st.text(max_size=20) | st.from_regex(r"[a-z]{3,8}\[[0-9:topb% .]{0,9}\]", fullmatch=True))
def test_any_text_takes_parameters_or_is_refused_with_what_there_is(text):
    try:
        taken, refused = PLAIN.select([text]), ""
    except RecipeError as error:
        taken, refused = frozenset(), str(error)
    if refused:
        assert repr(text) in refused
        assert refused.endswith(f"This model has {PLAIN.existing()}")
    else:
        assert taken


NO_SELECTORS = [
    *(
        "",
        "vison",
        "Vision",
        "layers ",
        " layers",
        "visual",
        "merger, norm",
        "layers[0:4",
        "all[0]",
    ),
    *("layers[]", "layers[-1]", "layers[1,2]", "layers[0:4:2]", "layers[top]", "layers[top -1]"),
    *("layers[top 2.5]", "layers[middle 3]", "layers[top 25 %]", "layers[٣]", "layers[0][1]"),
    f"layers[{'9' * 5000}]",
]


@pytest.mark.parametrize("text", NO_SELECTORS)
def test_what_is_no_selector_is_refused_without_a_model(text):
    with pytest.raises(RecipeError, match=r"is no selector: a selector is|has no layers to choose"):
        parse_selector(text)


@pytest.mark.parametrize(
    "text", ["layers[4:4]", "layers[5:2]", "layers[:0]", "layers[top 0]", "vision[bottom 0%]"]
)
def test_a_cut_that_takes_no_layer_of_any_model_is_refused_without_one(text):
    with pytest.raises(RecipeError, match="takes no layer"):
        parse_selector(text)


def test_a_share_above_100_and_layers_of_a_part_without_are_refused():
    with pytest.raises(RecipeError, match="at most 100%"):
        parse_selector("layers[top 101%]")
    with pytest.raises(RecipeError, match=r"merger has no layers .* write 'merger' alone"):
        parse_selector("merger[0]")


@pytest.mark.parametrize(
    "text", ["layers[7]", "layers[6:8]", "layers[7:]", "layers[top 8]", "layers[bottom 8]"]
)
def test_layers_that_are_not_there_are_refused_with_what_there_is(text):
    with pytest.raises(
        RecipeError, match=r"layers has 7 layers, layers\[0:7\]\. This model has vi"
    ):
        PLAIN.select(["norm", text])


def test_parts_that_are_not_there_are_refused_with_what_there_is():
    places = {name: at for name, at in PLAIN.places.items() if at.part != "adapters"}
    with pytest.raises(RecipeError) as caught:
        Inventory(places).select(["adapters"])
    assert str(caught.value) == (
        "'adapters' takes nothing: there are no adapters. This model has vision[0:4], merger, "
        "embedding, layers[0:7], norm, projection"
    )


def test_no_selector_takes_nothing():
    assert PLAIN.select([]) == frozenset()
