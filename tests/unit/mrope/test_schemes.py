import json
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colfolio.batch import offsets_of
from colfolio.mrope import (
    SCHEMES,
    VIDEO,
    Qwen2_5VL,
    Qwen2VL,
    Qwen3VL,
    Scheme,
    Span,
    VideoRoPE,
    described,
    position_ids,
    scheme_of,
)
from colfolio.mrope.rotary import interleaved, sectioned, spatial_first

schemes = st.one_of(
    st.builds(Qwen2VL, st.booleans()),
    st.builds(Qwen2_5VL, st.booleans(), st.sampled_from([1, 2, 4.0, 2.5])),
    st.just(Qwen3VL()),
    st.builds(VideoRoPE, st.integers(1, 9)),
)


@dataclass(frozen=True)
class Flat(Qwen3VL):
    """One position for a whole image or clip."""

    step: int = 1

    def spans(self, kind, frames, height, width, seconds):  # noqa: ARG002
        return (Span(torch.zeros(3, frames * height * width, dtype=torch.int64), self.step),)


@given(scheme=schemes)
def test_what_is_described_is_read_back_also_from_json(scheme):
    assert scheme_of(described(scheme)) == scheme
    assert scheme_of(json.loads(json.dumps(described(scheme)))) == scheme
    assert scheme_of(scheme) is scheme


@pytest.mark.parametrize("name", SCHEMES)
def test_every_name_gives_its_scheme_and_its_scheme_is_read_back(name):
    assert scheme_of(name) == SCHEMES[name]
    assert scheme_of({"scheme": name}) == SCHEMES[name]
    assert scheme_of(described(SCHEMES[name])) == SCHEMES[name]


@pytest.mark.parametrize("tokens_per_second", [2, 2.5])
def test_whole_numbers_and_fractions_of_positions_a_second_are_settings(tokens_per_second):
    scheme = scheme_of({"scheme": "qwen2_5_vl", "tokens_per_second": tokens_per_second})
    assert scheme == Qwen2_5VL(tokens_per_second=float(tokens_per_second))


def test_a_description_is_not_changed_by_reading_it():
    description = described(VideoRoPE(temporal_spacing=3))
    scheme_of(description)
    assert description == {"scheme": "videorope", "temporal_spacing": 3}


def test_a_setting_that_a_scheme_lacks_is_named():
    with pytest.raises(ValueError, match=r"'videorope' has no settings \['spacing'\]"):
        scheme_of({"scheme": "videorope", "spacing": 3})


@pytest.mark.parametrize("scheme", ["qwen", {"scheme": "qwen"}, {"temporal_spacing": 2}, {}])
def test_an_unknown_name_is_answered_with_those_that_are_known(scheme):
    with pytest.raises(ValueError, match=r"is none of qwen2_vl, .*videorope"):
        scheme_of(scheme)


def test_a_scheme_of_ones_own_works_unnamed_and_is_described_once_it_is_entered(monkeypatch):
    types = torch.tensor([VIDEO, VIDEO, 0])
    grids = torch.tensor([[1, 2, 4]])
    positions = position_ids(types, offsets_of([3]), video_grid_thw=grids, scheme=Flat(step=5))
    assert positions.tolist() == [[0, 0, 5]] * 3
    with pytest.raises(ValueError, match=r"Flat\(step=5\) has no name: enter"):
        described(Flat(step=5))
    monkeypatch.setitem(SCHEMES, "flat", Flat())
    assert described(Flat(step=5)) == {"scheme": "flat", "step": 5}
    assert scheme_of({"scheme": "flat", "step": 5}) == Flat(step=5)


@pytest.mark.parametrize("spacing", [0, -2])
def test_a_spacing_that_lets_steps_share_a_position_is_refused(spacing):
    with pytest.raises(ValueError, match=rf"whole number of at least 1.*not {spacing}"):
        VideoRoPE(temporal_spacing=spacing)


@pytest.mark.parametrize("rate", [0, -2.0, float("nan")])
def test_time_that_stands_still_or_runs_back_is_refused(rate):
    with pytest.raises(ValueError, match="tokens_per_second must be above 0"):
        Qwen2_5VL(tokens_per_second=rate)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_scheme_is_a_value(scheme):
    assert hash(replace(scheme)) == hash(scheme)
    assert replace(scheme) == scheme
    with pytest.raises(AttributeError):
        scheme.behind_time = None


def test_schemes_of_one_setting_but_two_classes_differ():
    assert len({Qwen2VL(), Qwen3VL(), Qwen2_5VL(), VideoRoPE(), Qwen2VL(behind_time=True)}) == 5
    assert isinstance(Qwen2VL(), Scheme)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("qwen2_vl", (16, 24, 24)),
        ("qwen2_5_vl", (16, 24, 24)),
        ("qwen3_vl", (24, 20, 20)),
        ("videorope", (16, 24, 24)),
    ],
)
def test_sections_of_a_head_of_128_are_the_published_ones(name, published):
    assert SCHEMES[name].sections(64) == published


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@given(num_frequencies=st.integers(3, 256))
def test_sections_share_all_frequencies_and_axes_give_each_its_share(scheme, num_frequencies):
    sections = scheme.sections(num_frequencies)
    axes = scheme.axes(sections)
    assert axes.bincount(minlength=3).tolist() == list(sections)
    assert len(axes) == num_frequencies
    assert sections[1] == sections[2]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen2_vl", sectioned),
        ("qwen2_vl_published", sectioned),
        ("qwen2_5_vl", sectioned),
        ("qwen2_5_vl_published", sectioned),
        ("qwen3_vl", interleaved),
        ("videorope", spatial_first),
    ],
)
def test_every_scheme_has_the_layout_of_its_source(name, layout):
    assert torch.equal(SCHEMES[name].axes((6, 5, 5)), layout((6, 5, 5)))


def test_every_axis_turns_something_from_three_frequencies_on():
    for scheme in SCHEMES.values():
        for num_frequencies in range(3, 129):
            assert min(scheme.sections(num_frequencies)) > 0


@pytest.mark.parametrize("num_frequencies", [0, 1, 2])
def test_fewer_frequencies_than_axes_are_refused(num_frequencies):
    for scheme in SCHEMES.values():
        with pytest.raises(ValueError, match=f"^{num_frequencies} frequencies"):
            scheme.sections(num_frequencies)


def test_a_default_dtype_never_changes_times():
    torch.set_default_dtype(torch.bfloat16)
    try:
        (under,) = Qwen2_5VL(tokens_per_second=25).spans(2, 40, 1, 1, 1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert under.coordinates[0].tolist() == [25 * step for step in range(40)]


def test_settings_that_are_no_fields_are_refused():
    class Moved(VideoRoPE):
        def __init__(self, by):
            super().__init__()
            object.__setattr__(self, "by", by)

    with pytest.raises(ValueError, match=r"Moved keeps \['by'\] beside its fields"):
        scheme_of(Moved(3))


@pytest.mark.parametrize(
    "wrong", [lambda ids: ids[:, 1:], lambda ids: ids / 2, lambda ids: ids[:2]]
)
def test_coordinates_of_another_form_name_the_scheme(wrong):
    @dataclass(frozen=True)
    class Wrong(VideoRoPE):
        def spans(self, *given):
            return tuple(
                Span(wrong(span.coordinates), span.advance) for span in super().spans(*given)
            )

    types, offsets = torch.ones(4, dtype=torch.int64), offsets_of([4])
    with pytest.raises(ValueError, match=r"Wrong.* must give int64 coordinates \[3, tokens\]"):
        position_ids(types, offsets, torch.tensor([[1, 4, 4]]), scheme=Wrong())
