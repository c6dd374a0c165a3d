"""What a row drops is a function of the row alone, and looks like chance in every direction."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from colfolio.batch import offsets_of
from colfolio.errors import ColfolioError
from colfolio.training.dropout import (
    DropoutKeys,
    RowDropout,
    RowDropouts,
    dropout_keys,
    row_keys,
)

NONE = torch.zeros(0, dtype=torch.int64)
ROWS, LENGTH, FEATURES = 30, 64, 512


class Model(nn.Module):
    """Places that drop, two of them in a vision tower."""

    def __init__(self, p=0.5):
        super().__init__()
        self.text = nn.ModuleList([nn.Dropout(p), nn.Dropout(p)])
        self.visual = nn.ModuleDict({"block": nn.Dropout(p), "merger": nn.Dropout(p)})


def keys_of(lengths, ids=None, seed=0, side="documents"):
    ids = torch.arange(len(lengths)) if ids is None else torch.tensor(ids)
    return DropoutKeys(row_keys(ids, offsets_of(lengths), seed, side), NONE)


def masks(p, **of):
    """Where 1920 tokens of 30 rows are dropped: in a place, in another, and in the first again."""
    model = Model(p)
    draws = RowDropouts(model)
    ones = torch.ones(ROWS * LENGTH, FEATURES)
    with draws.of(keys_of([LENGTH] * ROWS, **of)):
        places = (model.text[0], model.text[1], model.text[0])
        return [(place(ones) == 0).double() for place in places]


def standard(mask, p):
    return (mask - p) / (p * (1 - p)) ** 0.5


def deviations(numbers):
    """By how many of its standard deviations a mean of unrelated numbers of variance 1 is off 0."""
    return abs(numbers.mean().item()) * numbers.numel() ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_every_token_and_every_feature_is_dropped_at_the_rate(p):
    found = standard(masks(p)[0], p)
    assert deviations(found) < 4
    for side in (0, 1):
        sums = found.sum(dim=side) / found.shape[side] ** 0.5  # of variance 1 each
        chi_square = sums.square().mean().item()
        assert chi_square == pytest.approx(1, abs=4 * (2 / len(sums)) ** 0.5)
        assert sums.abs().max() < 5.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_draw_tells_of_another(p):
    first, second, again = (standard(mask, p) for mask in masks(p))
    other = standard(masks(p, seed=1)[0], p)
    queries = standard(masks(p, side="queries")[0], p)
    rows = first.unflatten(0, (ROWS, LENGTH))
    pairs = {
        "features": first[:, 1:] * first[:, :-1],
        "places": rows[:, 1:] * rows[:, :-1],
        "rows": rows[1:] * rows[:-1],
        "modules": first * second,
        "calls": first * again,
        "seeds": first * other,
        "sides": first * queries,
    }
    # four at the corners of a rectangle, where a product of two hashes could be caught
    pairs["corners"] = pairs["features"][1:] * pairs["features"][:-1]
    pairs["corners of modules"] = pairs["modules"][1:] * pairs["modules"][:-1]
    assert {name: deviations(pair) for name, pair in pairs.items() if deviations(pair) > 4} == {}


def test_any_two_tokens_and_any_two_features_are_as_unlike_as_chance_makes_them():
    first, second, _ = (standard(mask, 0.5) for mask in masks(0.5))
    for one, other in ((first, first), (first, second), (first.T, first.T)):
        products = (one @ other.T / one.shape[1] ** 0.5).fill_diagonal_(0)  # of variance 1 each
        assert products.square().mean().item() == pytest.approx(1, abs=0.02)
        assert products.abs().max() < 7


def test_what_is_kept_is_scaled_up_and_the_gradient_goes_the_same_way():
    model = Model(0.2)
    draws = RowDropouts(model)
    hidden = torch.ones(1, 100, 8, dtype=torch.float64, requires_grad=True)
    with draws.of(keys_of([100])):
        out = model.text[0](hidden)
    out.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, out.detach())
    assert out.unique().tolist() == [0.0, 1 / 0.8]


def test_a_row_drops_the_same_in_any_company():
    model = Model()
    draws = RowDropouts(model)

    def rows_of(ids, lengths):
        with draws.of(keys_of(lengths, ids)):
            return model.text[1](torch.ones(sum(lengths), 16)).split(lengths)

    together = rows_of([7, 3, 900], [5, 9, 4])
    in_another_order = rows_of([900, 7, 3], [4, 5, 9])
    assert torch.equal(together[0], in_another_order[1])
    assert torch.equal(together[1], in_another_order[2])
    assert torch.equal(together[2], in_another_order[0])
    assert torch.equal(rows_of([3], [9])[0], together[1])
    longer = rows_of([3], [12])[0]  # what stands behind changes nothing before
    assert torch.equal(longer[:9], together[1])


def test_rows_of_any_number_draw_for_themselves():
    ids = [0, 1, -1, 2**62, -(2**63), 2**63 - 1, 2**32]
    keys = keys_of([8] * len(ids), ids).tokens
    assert len(keys.unique()) == 8 * len(ids)
    assert not torch.isin(keys_of([8] * len(ids), ids, seed=1).tokens, keys).any()
    assert len(row_keys(NONE, offsets_of([]), 0, "queries")) == 0
    assert torch.equal(keys_of([2, 0, 1]).tokens, keys_of([2, 1], [0, 2]).tokens)


def test_in_evaluation_nothing_is_dropped_and_no_keys_are_asked_for():
    model = Model()
    RowDropouts(model)
    hidden = torch.ones(3, 4)
    assert model.eval().text[0](hidden) is hidden


def test_a_run_without_keys_is_refused():
    model = Model()
    draws = RowDropouts(model)
    with draws.of(keys_of([3])):
        pass
    with pytest.raises(RuntimeError, match=r"text\.0: no rows to draw dropout for; run .* `of"):
        model.text[0](torch.ones(3, 4))


def test_only_what_drops_is_replaced_and_all_comes_back():
    model = Model()
    model.text.append(nn.Dropout(0.0))
    before = dict(model.named_modules())
    draws = RowDropouts(model)
    assert len(draws) == 4
    assert [type(each) for each in model.text] == [RowDropout, RowDropout, nn.Dropout]
    assert not model.state_dict()
    model.eval()
    draws.restore()
    assert dict(model.named_modules()) == before
    assert not model.text[0].training
    assert len(draws) == 0


def test_a_later_run_on_the_same_model_takes_its_places_over():
    model = Model()
    RowDropouts(model)
    draws = RowDropouts(model.eval())
    assert not model.text[0].training
    with draws.of(keys_of([3])):
        assert (model.train().text[0](torch.ones(3, 400)) == 0).any()
    draws.restore()
    assert type(model.text[0]) is nn.Dropout


def test_a_copy_of_a_model_draws_from_its_own_keys():
    model = nn.ModuleDict({"one": Model()})
    draws = RowDropouts(model)
    other = copy.deepcopy(model)
    with draws.of(keys_of([3])), pytest.raises(RuntimeError, match="no rows to draw dropout for"):
        other["one"].text[0](torch.ones(3, 4))


def test_a_vision_tower_draws_by_patch_and_by_merged_group(shared_retriever, pages):
    packed = shared_retriever.collator.documents(pages)
    model = Model()
    draws = RowDropouts(model)
    num_patches = len(packed.patches)

    def run(packed, ids, count, place):
        with draws.of(dropout_keys(packed, torch.tensor(ids), 5, "documents")):
            return model.visual[place](torch.ones(count, 16))

    whole = run(packed, range(7), num_patches, "block")
    merged = run(packed, range(7), num_patches // 4, "merger")
    begin = int(packed.grid_thw[:2].prod(dim=1).sum())
    alone = packed.rows(2, 5)
    size = len(alone.patches)
    assert torch.equal(run(alone, [2, 3, 4], size, "block"), whole[begin : begin + size])
    found = run(alone, [2, 3, 4], size // 4, "merger")
    assert torch.equal(found, merged[begin // 4 : (begin + size) // 4])


@pytest.mark.parametrize("place", ["text", "visual"])
def test_features_of_other_rows_are_refused(shared_retriever, pages, place):
    packed = shared_retriever.collator.documents(pages)
    model = Model()
    draws = RowDropouts(model)
    module = model.text[0] if place == "text" else model.visual["block"]
    with (
        draws.of(dropout_keys(packed, torch.arange(7), 0, "documents")),
        pytest.raises(ValueError, match=rf"{place}\..*: received 11 rows of features, but .* 1"),
    ):
        module(torch.ones(11, 4))


class Attention(nn.Module):
    attention_dropout = 0.1


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Dropout2d(0.1), r"layer\.it: Dropout2d drops whole channels"),
        (nn.Dropout(1.0), r"layer\.it: a dropout of 1 leaves nothing"),
        (Attention(), r"layer\.it: attention_dropout is 0\.1.* set it to 0"),
    ],
)
def test_what_cannot_be_drawn_by_row_is_refused(module, message):
    model = nn.ModuleDict({"layer": nn.ModuleDict({"it": module})})
    with pytest.raises(ColfolioError, match=message):
        RowDropouts(model)


def test_a_layer_computed_again_draws_what_it_drew_whatever_ran_in_between():
    model = Model()
    draws = RowDropouts(model)
    place = model.text[0]

    def layer(hidden):
        return place(hidden).square() + place(hidden)  # two calls of one module

    def gradient(keys, *, again):
        hidden = torch.ones(6, 32, dtype=torch.float64, requires_grad=True)
        with draws.of(keys):
            place(hidden)  # so that the layer's calls are not the first
            if again:
                out = checkpoint(layer, hidden, use_reentrant=False, context_fn=draws.contexts)
            else:
                out = layer(hidden)
        return hidden, out

    plain = [gradient(keys_of([6], [row]), again=False) for row in range(3)]
    checkpointed = [gradient(keys_of([6], [row]), again=True) for row in range(3)]
    with draws.of(keys_of([2])):  # backward may come while others run
        for one, other in zip(plain, checkpointed, strict=True):
            assert torch.equal(one[1], other[1])
            found = [torch.autograd.grad(out.sum(), hidden)[0] for hidden, out in (one, other)]
            assert torch.equal(*found)
        place(torch.ones(2, 32))  # the rows that run now are those of before
