import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from colfolio.mrope import SCHEMES, cos_sin, inverse_frequencies, rotate
from colfolio.mrope.rotary import interleaved, sectioned, spatial_first

LAYOUTS = [sectioned, interleaved, spatial_first]
SECTIONS = (6, 5, 5)  # fits all three layouts
LENGTH, HEAD = 7, 32


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def drawn(generator, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator, dtype=dtype)


def angles(generator, *shape, head=HEAD):
    """Cos and sin of random positions `[3, *shape]`."""
    positions = torch.randint(0, 300, (3, *shape), generator=generator)
    axes = spatial_first((head // 8, 3 * head // 16, 3 * head // 16))
    return cos_sin(positions, inverse_frequencies(head), axes)


def plain_rotation(states, cos, sin, heads_dim=1):
    """Pair `i` is dimensions `i` and `F + i`; each is turned as a complex number."""
    half = cos.shape[-1]
    turned = states.double().clone()
    pairs = torch.complex(turned[..., :half], turned[..., half : 2 * half])
    pairs = pairs * torch.complex(cos.double(), sin.double()).unsqueeze(heads_dim)
    turned[..., :half], turned[..., half : 2 * half] = pairs.real, pairs.imag
    return turned


def test_rotation_multiplies_pairs_by_their_angle(generator):
    cos, sin = angles(generator, 2, LENGTH)
    queries, keys = drawn(generator, 2, 4, LENGTH, HEAD), drawn(generator, 2, 1, LENGTH, HEAD)
    for states, turned in zip((queries, keys), rotate(queries, keys, cos, sin), strict=True):
        torch.testing.assert_close(
            turned.double(), plain_rotation(states, cos, sin), atol=1e-6, rtol=0
        )


def test_packed_rotation_equals_padded_rotation_forward_and_backward(generator):
    lengths = [3, 7, 1]
    cos, sin = angles(generator, len(lengths), max(lengths))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # [B, L]
    states = drawn(generator, len(lengths), 4, max(lengths), HEAD).requires_grad_()
    weight = drawn(generator, *states.shape)
    padded = rotate(states, states[:, :2], cos, sin)
    row_major = states.transpose(1, 2)[real]  # [N, heads, D]
    packed = rotate(row_major, row_major[:, :2], cos[real], sin[real])
    gradients = []
    for number, (of_packed, of_padded) in enumerate(zip(packed, padded, strict=True)):
        assert torch.equal(of_packed, of_padded.transpose(1, 2)[real]), number
        by_row = weight[:, : of_padded.shape[1]].transpose(1, 2)[real]
        masked = torch.zeros_like(of_padded).transpose(1, 2).clone()
        masked[real] = by_row
        gradients.append(torch.autograd.grad(of_packed, states, by_row, retain_graph=True)[0])
        gradients.append(
            torch.autograd.grad(of_padded, states, masked.transpose(1, 2), retain_graph=True)[0]
        )
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[2], gradients[3])


def test_heads_may_lie_behind_the_length(generator):
    cos, sin = angles(generator, 2, LENGTH)
    states = drawn(generator, 2, LENGTH, 4, HEAD)
    behind = rotate(states, states, cos, sin, heads_dim=2)[0]
    assert torch.equal(behind, rotate(*[states.transpose(1, 2)] * 2, cos, sin)[0].transpose(1, 2))


def test_one_row_of_angles_serves_a_whole_batch(generator):
    cos, sin = angles(generator, 1, LENGTH)
    states = drawn(generator, 3, 2, LENGTH, HEAD)
    together = rotate(states, states, cos, sin)[0]
    assert torch.equal(together[1], rotate(states[1:2], states[1:2], cos, sin)[0][0])


@pytest.mark.parametrize("head", [HEAD + 1, HEAD + 2, 3 * HEAD])
def test_dimensions_behind_those_that_turn_stay(generator, head):
    cos, sin = angles(generator, 2, LENGTH)
    states = drawn(generator, 2, 4, LENGTH, head).requires_grad_()
    turned = rotate(states, states, cos, sin)[0]
    assert torch.equal(turned[..., HEAD:], states[..., HEAD:])
    alone = rotate(states[..., :HEAD], states[..., :HEAD], cos, sin)[0]
    assert torch.equal(turned[..., :HEAD], alone)
    weight = drawn(generator, *states.shape)
    gradient = torch.autograd.grad(turned, states, weight)[0]
    assert torch.equal(gradient[..., HEAD:], weight[..., HEAD:])


def test_first_and_second_derivatives_are_those_of_the_rotation(generator):
    cos, sin = angles(generator, 2, 3, head=16)
    queries = drawn(generator, 2, 2, 3, 18, dtype=torch.float64).requires_grad_()
    keys = drawn(generator, 2, 1, 3, 16, dtype=torch.float64).requires_grad_()

    def rotated(queries, keys):
        # a square, so that the second derivative is not zero
        return tuple(part**2 for part in rotate(queries, keys, cos, sin))

    assert torch.autograd.gradcheck(rotated, (queries, keys))
    assert torch.autograd.gradgradcheck(rotated, (queries, keys))


def test_backward_keeps_cos_and_sin_and_nothing_else(generator):
    cos, sin = angles(generator, 2, LENGTH)
    states = drawn(generator, 2, 4, LENGTH, HEAD).requires_grad_()
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rotate(states, states, cos, sin)
    assert {tensor.data_ptr() for tensor in kept} == {cos.data_ptr(), sin.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_states_keep_their_dtype_and_inputs_their_values(generator, dtype):
    cos, sin = angles(generator, 2, LENGTH)
    states = drawn(generator, 2, 4, LENGTH, HEAD).to(dtype)
    kept = [states.clone(), cos.clone(), sin.clone()]
    queries, keys = rotate(states, states, cos, sin)
    assert queries.dtype == keys.dtype == dtype
    for now, before in zip((states, cos, sin), kept, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(shift=st.integers(-50, 50))
def test_a_shift_of_all_positions_changes_no_product_of_query_and_key(layout, shift):
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 50, (3, LENGTH), generator=generator)
    queries, keys = drawn(generator, LENGTH, 2, HEAD), drawn(generator, LENGTH, 2, HEAD)
    products = []
    for moved in (positions, positions + shift):
        turned = rotate(
            queries, keys, *cos_sin(moved, inverse_frequencies(HEAD, 100.0), layout(SECTIONS))
        )
        products.append(torch.einsum("nhd,mhd->hnm", *turned))
    torch.testing.assert_close(*products, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_frequency_reads_the_position_of_its_axis(generator, layout):
    positions = torch.randint(0, 40, (3, 2, LENGTH), generator=generator)
    inv_freq, axes = inverse_frequencies(HEAD), layout(SECTIONS)
    cos, sin = cos_sin(positions, inv_freq, axes)
    assert cos.shape == sin.shape == (2, LENGTH, HEAD // 2)
    for number, axis in enumerate(axes.tolist()):
        angle = positions[axis].float() * inv_freq[number]
        assert torch.equal(cos[..., number], angle.cos())
        assert torch.equal(sin[..., number], angle.sin())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_positions_give_the_bits_of_one_dimensional_rope(layout):
    positions = torch.arange(4000)
    inv_freq = inverse_frequencies(HEAD)
    plain = cos_sin(positions, inv_freq)
    for three, one in zip(
        cos_sin(positions.expand(3, -1), inv_freq, layout(SECTIONS)), plain, strict=True
    ):
        assert torch.equal(three, one)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_angles_are_computed_in_float32_whatever_comes_in(dtype):
    positions = torch.arange(4000, dtype=dtype)
    inv_freq = inverse_frequencies(HEAD)
    for angle in cos_sin(positions, inv_freq.double()):
        assert angle.dtype == torch.float32
    assert torch.equal(cos_sin(positions, inv_freq)[0], cos_sin(positions.long(), inv_freq)[0])


def test_frequencies_fall_from_one_by_a_constant_ratio():
    inv_freq = inverse_frequencies(128, theta=10_000.0).double()
    assert inv_freq[0] == 1
    torch.testing.assert_close(
        inv_freq[1:] / inv_freq[:-1], inv_freq[1].expand(63), atol=1e-6, rtol=0
    )
    assert inv_freq[32].item() == pytest.approx(10_000**-0.5)


@pytest.mark.parametrize("head_size", [0, 1, 7, -2])
def test_an_odd_head_size_is_refused(head_size):
    with pytest.raises(ValueError, match=rf"must be even, not {head_size}$"):
        inverse_frequencies(head_size)


@given(st.tuples(*[st.integers(0, 12)] * 2).filter(any))
def test_sections_of_qwen2_vl_follow_one_another(sizes):
    temporal, spatial = sizes
    axes = sectioned((temporal, spatial, spatial + 1))
    assert axes.tolist() == [0] * temporal + [1] * spatial + [2] * (spatial + 1)


@given(temporal=st.integers(0, 12), spatial=st.integers(1, 12))
def test_videorope_lets_height_and_width_alternate_and_time_turn_what_is_slowest(temporal, spatial):
    # the published code walks the frequencies: the first `height + width` of them alternate
    plain = [
        (1 if place % 2 == 0 else 2) if place < 2 * spatial else 0
        for place in range(temporal + 2 * spatial)
    ]
    assert spatial_first((temporal, spatial, spatial)).tolist() == plain


@given(temporal=st.integers(0, 40), height=st.integers(0, 12), width=st.integers(0, 12))
def test_qwen3_vl_gives_every_third_frequency_to_height_and_width_as_long_as_they_last(
    temporal, height, width
):
    total = temporal + height + width
    assume(total > 0 and 3 * height - 1 <= total and 3 * width <= total)
    plain = [0] * total
    for number in range(height):
        plain[3 * number + 1] = 1
    for number in range(width):
        plain[3 * number + 2] = 2
    assert interleaved((temporal, height, width)).tolist() == plain


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sections", [(8, 8), (2, 2, 2, 2), (4, -1, 5), (0, 0, 0), ()])
def test_sections_are_three_sizes(layout, sections):
    with pytest.raises(ValueError, match=r"three sizes, temporal, height and width, not \("):
        layout(sections)


@pytest.mark.parametrize(
    ("sections", "axis"), [((0, 2, 2), 1), ((1, 4, 1), 1), ((2, 1, 4), 2), ((0, 0, 1), 2)]
)
def test_interleaved_sections_without_room_for_an_axis_are_refused(sections, axis):
    with pytest.raises(ValueError, match=rf"axis {axis} can turn at most \d of {sum(sections)}"):
        interleaved(sections)


def test_alternating_sections_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 5, 6\): height and width alternate"):
        spatial_first((4, 5, 6))


@pytest.mark.parametrize(("queries", "keys"), [(HEAD - 2, HEAD), (HEAD, HEAD - 1)])
def test_heads_that_are_too_small_are_refused_with_all_sizes(generator, queries, keys):
    cos, sin = angles(generator, LENGTH)
    message = rf"turn {HEAD} dimensions, but heads have {queries} .queries. and {keys} .keys."
    with pytest.raises(ValueError, match=message):
        rotate(torch.zeros(LENGTH, 2, queries), torch.zeros(LENGTH, 2, keys), cos, sin)


@pytest.mark.parametrize("learned", [0, 1])
def test_angles_that_need_a_gradient_are_refused(generator, learned):
    both = angles(generator, LENGTH)
    both[learned].requires_grad_()
    states = torch.zeros(LENGTH, 2, HEAD)
    with pytest.raises(ValueError, match="cos and sin need a gradient"):
        rotate(states, states, *both)


@pytest.mark.parametrize("name", SCHEMES)
def test_angles_of_a_scheme_fill_half_a_head(name):
    scheme = SCHEMES[name]
    cos, _ = cos_sin(torch.zeros(3, 5), inverse_frequencies(128), scheme.axes(scheme.sections(64)))
    assert cos.shape == (5, 64)


@pytest.mark.parametrize(
    ("queries", "cos", "sin", "heads_dim"),
    [
        ((2, 4, 5, 8), (2, 6, 4), (2, 6, 4), 1),
        ((2, 4, 5, 8), (3, 5, 4), (3, 5, 4), 1),
        ((2, 4, 5, 8), (2, 5, 4), (2, 5, 4), 2),
        ((2, 4, 5, 8), (5, 4), (5, 4), 1),
        ((2, 4, 5, 8), (2, 5, 4), (2, 5, 2), 1),
    ],
)
def test_angles_of_other_tokens_are_refused(queries, cos, sin, heads_dim):
    states = torch.zeros(queries)
    with pytest.raises(ValueError, match="do not fit queries"):
        rotate(states, states, torch.zeros(cos), torch.zeros(sin), heads_dim)


def test_whole_numbers_are_not_turned():
    states = torch.zeros(5, 4, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="queries must be floating point"):
        rotate(states, states, torch.zeros(5, 4), torch.zeros(5, 4))


@pytest.mark.parametrize("theta", [0.0, -1.0, float("inf"), float("nan")])
def test_a_base_that_is_no_positive_number_is_refused(theta):
    with pytest.raises(ValueError, match="theta must be above 0"):
        inverse_frequencies(8, theta=theta)


def test_position_ids_and_axes_that_do_not_fit_are_refused():
    inv_freq, axes = inverse_frequencies(8), torch.tensor([0, 0, 1, 2])
    for shape in ((4, 1, 5), (5,), (2, 5), ()):
        with pytest.raises(ValueError, match=r"position_ids must be \[3, \.\.\.\]"):
            cos_sin(torch.zeros(shape, dtype=torch.int64), inv_freq, axes)
    with pytest.raises(ValueError, match=r"\[1\] axes do not fit \[4\] frequencies"):
        cos_sin(torch.zeros(3, 5, dtype=torch.int64), inv_freq, axes[:1])


def test_a_compiler_sees_one_graph_with_the_same_result():
    states = torch.randn(5, 4, 10)
    cos, sin = cos_sin(torch.arange(5).expand(3, -1), inverse_frequencies(8), torch.arange(4) % 3)
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    mine, plain = compiled(states, states, cos, sin), rotate(states, states, cos, sin)
    assert torch.equal(mine[0], plain[0])
    assert torch.equal(mine[1], plain[1])


def test_functional_gradients_are_those_of_backward():
    cos, sin = cos_sin(torch.arange(5).expand(3, -1), inverse_frequencies(8), torch.arange(4) % 3)
    states, weights = torch.randn(5, 4, 8), torch.randn(5, 4, 8)

    def score(queries):
        return (rotate(queries, queries, cos, sin)[0] * weights).sum()

    leaf = states.clone().requires_grad_()
    score(leaf).backward()
    assert torch.equal(torch.func.grad(score)(states), leaf.grad)
