import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from colfolio import attention
from colfolio.attention import packed_attention, packed_attention_forward
from colfolio.batch import offsets_of

lengths_of_rows = st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any)


def draw(tokens, heads=4, kv_heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(heads, tokens, 8), (kv_heads, tokens, 8), (kv_heads, tokens, 8)]
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


def by_definition(query, key, value, lengths, causal, scaling):
    pieces = [part.split(lengths, dim=1) for part in (query, key, value)]
    rows = [
        F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*pieces, strict=True)
    ]
    return torch.cat(rows, dim=1)


@given(lengths_of_rows, st.booleans(), st.sampled_from([0, 3, 128]))
def test_each_sequence_attends_to_itself_alone(lengths, causal, short):
    inputs = draw(sum(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_SHORT", short)
        mine = packed_attention(*inputs, offsets_of(lengths), causal=causal, scaling=0.3)
    plain = by_definition(*inputs, lengths, causal, 0.3)
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(mine, inputs, weight),
        torch.autograd.grad(plain, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_softmax_runs_in_float32_for_half_precision():
    inputs = [part.detach().bfloat16() for part in draw(40)]
    offsets = offsets_of([40])
    mine = packed_attention(*inputs, offsets, causal=True, scaling=0.35)
    exact = packed_attention(*(p.double() for p in inputs), offsets, causal=True, scaling=0.35)
    assert mine.dtype == torch.bfloat16
    # one rounding of the weights and one of the result, each 2^-9
    torch.testing.assert_close(mine.double(), exact, rtol=0, atol=2**-6)


def test_dropout_drops_and_keeps_the_mean():
    torch.manual_seed(0)
    query, key, _ = draw(6)
    value = torch.ones(2, 6, 8, dtype=torch.float64)
    means = [
        packed_attention(
            query, key, value, offsets_of([6]), causal=False, scaling=0.3, dropout=0.5
        ).mean()
        for _ in range(400)
    ]
    assert torch.stack(means).std() > 0
    assert torch.stack(means).mean().item() == pytest.approx(1.0, abs=0.05)


class Layer(torch.nn.Module):
    is_causal = True


def test_a_call_without_boundaries_is_refused():
    query, key, value = (part.unsqueeze(0) for part in draw(4))
    with pytest.raises(ValueError, match="needs cu_seq_lens_q and no mask"):
        packed_attention_forward(Layer(), query, key, value, None)
    with pytest.raises(ValueError, match="needs cu_seq_lens_q and no mask"):
        packed_attention_forward(
            Layer(), query, key, value, torch.ones(4), cu_seq_lens_q=offsets_of([4])
        )


def test_the_layer_says_whether_later_tokens_are_seen_unless_the_call_does():
    query, key, value = (part.unsqueeze(0) for part in draw(4))
    offsets = offsets_of([4])
    causal, _ = packed_attention_forward(Layer(), query, key, value, None, cu_seq_lens_q=offsets)
    both, _ = packed_attention_forward(
        Layer(), query, key, value, None, cu_seq_lens_q=offsets, is_causal=False
    )
    assert causal.shape == (1, 4, 4, 8)
    assert not torch.allclose(causal[0, 0], both[0, 0])  # the first token sees others
    torch.testing.assert_close(causal[0, -1], both[0, -1])  # the last sees all either way


def test_no_sequences_at_all_give_nothing():
    query, key, value = draw(0)
    assert packed_attention(query, key, value, offsets_of([0]), causal=True, scaling=1.0).shape == (
        4,
        0,
        8,
    )
