import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from colfolio.training.losses import LossSettings, check_masks, info_nce

SETTINGS = LossSettings()


def random_scores(queries=4, documents=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, documents, generator=generator, dtype=torch.float64) * 3
    return scores.requires_grad_()


def mask(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def nothing(like):
    return torch.zeros(like.shape, dtype=torch.bool)


@given(st.integers(1, 5), st.integers(2, 7), st.integers(0, 99), st.floats(0.05, 5))
def test_one_positive_each_is_cross_entropy(queries, documents, seed, temperature):
    scores, plain = random_scores(queries, documents, seed), random_scores(queries, documents, seed)
    targets = torch.arange(queries) % documents
    positives = F.one_hot(targets, documents).bool()
    settings = LossSettings(temperature=temperature)
    mine = info_nce(scores, positives, nothing(scores), settings).loss
    theirs = F.cross_entropy(plain / temperature, targets)
    mine.backward()
    theirs.backward()
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scores.grad, plain.grad, rtol=1e-8, atol=1e-12)


def test_several_positives_pay_the_mean_each_against_the_negatives_alone():
    scores = random_scores(1, 5)
    positives = mask([1, 0, 1, 0, 0])
    each = [
        F.cross_entropy(scores[:, [positive, 1, 3, 4]], torch.tensor([0])) for positive in (0, 2)
    ]
    mine = info_nce(scores, positives, nothing(scores), SETTINGS).loss
    torch.testing.assert_close(mine, torch.stack(each).mean())


def test_a_positive_never_pushes_another_away():
    scores = random_scores(1, 4)
    info_nce(scores, mask([1, 1, 0, 0]), nothing(scores), SETTINGS).loss.backward()
    assert (scores.grad[0, :2] < 0).all()
    assert (scores.grad[0, 2:] > 0).all()


def test_every_query_weighs_the_same_however_many_positives_it_has():
    scores = random_scores(2, 5)
    positives = mask([1, 0, 0, 0, 0], [1, 1, 1, 0, 0])
    both = info_nce(scores, positives, nothing(scores), SETTINGS).loss
    alone = [
        info_nce(scores[[row]], positives[[row]], nothing(scores[[row]]), SETTINGS).loss
        for row in range(2)
    ]
    torch.testing.assert_close(both, torch.stack(alone).mean())


def test_an_ignored_document_is_as_good_as_absent():
    scores = random_scores(3, 6)
    positives = F.one_hot(torch.tensor([0, 1, 2]), 6).bool()
    ignored = nothing(scores)
    ignored[:, 4] = True
    loss = info_nce(scores, positives, ignored, SETTINGS).loss
    loss.backward()
    assert (scores.grad[:, 4] == 0).all()
    assert (scores.grad[:, [0, 1, 2, 3, 5]] != 0).all()
    rest = [0, 1, 2, 3, 5]
    absent = info_nce(scores[:, rest], positives[:, rest], ignored[:, rest], SETTINGS)
    torch.testing.assert_close(loss, absent.loss)


@pytest.mark.parametrize("level", [0.0, -7.0, 1e4])
def test_chance_is_the_loss_of_equal_scores(level):
    scores = torch.full((3, 6), level, dtype=torch.float64)
    positives = mask([1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1])
    ignored = mask([0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0])
    for temperature in (0.1, 1.0):
        summary = info_nce(scores, positives, ignored, LossSettings(temperature=temperature))
        torch.testing.assert_close(summary.loss, summary.chance.double())
    assert summary.candidates.item() == pytest.approx((4 + 5 + 6) / 3)
    assert summary.accuracy == 0  # a tie is no hit
    assert summary.spread == 0


def test_the_order_of_queries_and_documents_never_changes_the_loss():
    scores = random_scores(3, 5)
    positives = mask([1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0])
    ignored = mask([0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0])
    rows, columns = torch.tensor([2, 0, 1]), torch.tensor([4, 2, 0, 1, 3])

    def turned(matrix):
        return matrix[rows][:, columns]

    plain = info_nce(scores, positives, ignored, SETTINGS).loss
    (gradient,) = torch.autograd.grad(plain, scores)
    other = scores.detach()[rows][:, columns].requires_grad_()
    loss = info_nce(other, turned(positives), turned(ignored), SETTINGS).loss
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, other)[0], turned(gradient))


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_huge_scores_stay_finite_forward_and_backward(scale):
    scores = (random_scores().float() * scale).detach().requires_grad_()
    loss = info_nce(scores, torch.eye(4, 6).bool(), nothing(scores), SETTINGS).loss
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


def test_the_summary_says_what_the_scores_say():
    scores = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 9.0]], requires_grad=True)
    positives, ignored = mask([1, 0, 0], [0, 1, 0]), mask([0, 0, 0], [0, 0, 1])
    summary = info_nce(scores, positives, ignored, SETTINGS)
    assert summary.margin.item() == pytest.approx(((3 - 2) + (4 - 5)) / 2)
    assert summary.accuracy.item() == 0.5
    assert summary.candidates.item() == pytest.approx((3 + 2) / 2)
    spread = scores.detach().std(dim=1, correction=0).mean()
    torch.testing.assert_close(summary.spread, spread)
    assert summary.loss.requires_grad
    others = (summary.margin, summary.accuracy, summary.spread, summary.chance)
    assert not any(number.requires_grad for number in others)


def test_the_margin_is_that_of_the_weakest_positive():
    scores = torch.tensor([[5.0, 1.0, 2.0]])
    assert info_nce(scores, mask([1, 1, 0]), nothing(scores), SETTINGS).margin == -1


def test_a_query_without_a_positive_is_named():
    with pytest.raises(ValueError, match="query 1 of the batch has no positive"):
        check_masks(mask([1, 0], [0, 0]), mask([0, 0], [0, 0]))


def test_a_query_without_a_negative_is_named():
    with pytest.raises(ValueError, match=r"query 0 of the batch has no negative .*\(2\)"):
        check_masks(mask([1, 0], [1, 0]), mask([0, 1], [0, 0]))
    with pytest.raises(ValueError, match=r"no negative among its documents \(1\)"):
        check_masks(mask([1]), mask([0]))


def test_a_query_that_ignores_everything_takes_no_part():
    check_masks(mask([1, 0], [0, 0]), mask([0, 0], [1, 1]))
    with pytest.raises(ValueError, match="query 1 of the batch has no positive"):
        check_masks(mask([1, 0], [0, 0]), mask([0, 0], [1, 0]))


def test_a_batch_of_which_no_query_takes_part_is_refused():
    with pytest.raises(ValueError, match=r"every query sits out .* queries \(2\) .*batch\.rows$"):
        check_masks(mask([0, 0], [0, 0]), mask([1, 1], [1, 1]))
    with pytest.raises(ValueError, match=r"raise batch\.rows or batch\.hard_negatives"):
        check_masks(mask([0, 0]), mask([1, 1]), torch.tensor([[1.0, 2.0]]))


def test_a_document_both_wanted_and_ignored_is_named():
    with pytest.raises(ValueError, match=r"query 1 of the batch both wants and ignores .* \[2\]"):
        check_masks(mask([1, 0, 0], [0, 1, 1]), mask([0, 0, 0], [0, 0, 1]))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[1.0, 2.0, 3.0]], r"expected \[2, 3\], found \[1, 3\]"),
        (
            [[1.0, 2.0, 3.0], [1.0, float("nan"), 2.0]],
            "query 1 .* for 1 of its documents .*batch.hard_neg",
        ),
        ([[1.0, float("-inf"), 3.0], [1.0, 2.0, 2.0]], "query 0 .* infinite teacher score"),
    ],
)
def test_teacher_scores_that_teach_nothing_are_named(scores, message):
    positives, ignored = mask([1, 0, 0], [0, 1, 0]), mask([0, 0, 0], [0, 0, 1])
    with pytest.raises(ValueError, match=message):
        check_masks(positives, ignored, torch.tensor(scores))


def test_teacher_scores_of_ignored_documents_are_not_asked_for():
    nan = float("nan")
    positives, ignored = mask([1, 0, 0], [0, 0, 0]), mask([0, 0, 1], [1, 1, 1])
    check_masks(positives, ignored, torch.tensor([[1.0, 2.0, nan], [nan, nan, nan]]))


def test_masks_that_leave_something_to_learn_pass():
    check_masks(mask([1, 0, 0], [1, 1, 0]), mask([0, 1, 0], [0, 0, 0]))


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="greater than 0"):
        LossSettings(temperature=0)
