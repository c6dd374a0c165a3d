"""What holds for every loss, and each loss against a plain definition of it."""

import math

import pytest
import torch
import torch.nn.functional as F

from colfolio.training.losses import LossSettings, check_masks, contrastive_loss, info_nce

KINDS = {
    "info_nce": LossSettings(temperature=0.7),
    "symmetric": LossSettings(temperature=0.7, symmetric=True),
    "pairwise": LossSettings(kind="pairwise", temperature=0.7),
    "sigmoid": LossSettings(kind="sigmoid", temperature=0.7, bias=-1.5),
    "distillation": LossSettings(kind="distillation", temperature=0.7),
}
RANGE = (-6.0, 9.0)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def problem(kind):
    return make_problem(kind)


def make_problem(kind, seed=0, queries=6, documents=9):
    """Several positives, ignored documents, hard negatives, a teacher that left documents out.

    Query 2 takes no part, and nobody wants the last two documents.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.rand(queries, documents, generator=generator)

    scores = torch.randn(queries, documents, generator=generator, dtype=torch.float64) * 2
    positives = draw() < 0.15
    positives[range(queries), range(queries)] = True
    positives[:, -2:] = False
    ignored = (draw() < 0.2) & ~positives
    positives[2], ignored[2] = False, True
    ignored[0, -1] = True
    teacher = torch.randn(queries, documents, generator=generator, dtype=torch.float64)
    teacher[(draw() < 0.3) & ~positives] = math.nan
    teacher = teacher if kind == "distillation" else None
    check_masks(positives, ignored, teacher)
    return Problem(scores.requires_grad_(), positives, ignored, KINDS[kind], teacher)


class Problem:
    """The arguments of a loss, which a test may turn and cut."""

    def __init__(self, scores, positives, ignored, settings, teacher):
        self.arguments = (scores, positives, ignored, settings, teacher)
        self.scores, self.positives, self.ignored, self.settings, self.teacher = self.arguments

    def summary(self, scores=None):
        given = (self.scores if scores is None else scores, *self.arguments[1:])
        return contrastive_loss(*given, score_range=RANGE)

    def loss(self, scores=None):
        return self.summary(scores).loss

    def gradient(self):
        return torch.autograd.grad(self.loss(), self.scores)[0]

    def changed(self, change):
        """The same with all matrices changed alike."""
        scores = change(self.scores.detach()).requires_grad_()
        teacher = None if self.teacher is None else change(self.teacher)
        masks = (change(self.positives), change(self.ignored))
        return Problem(scores, *masks, self.settings, teacher)


def plainly(problem):
    """Each loss by its definition, one query and one positive at a time."""
    scores, positives, ignored, settings, teacher = problem.arguments
    logits = scores / settings.temperature
    if settings.kind == "info_nce":
        loss = plain_info_nce(logits, positives, ignored)
        if settings.symmetric:
            loss = (loss + plain_info_nce(logits.T, positives.T, ignored.T)) / 2
        return loss
    rows = []
    for q in range(len(logits)):
        wanted = [d for d in range(logits.shape[1]) if positives[q, d]]
        refused = [d for d in range(logits.shape[1]) if not (positives[q, d] or ignored[q, d])]
        if not wanted:
            continue
        if settings.kind == "pairwise":
            hardest = max(logits[q, d] for d in refused)
            each = [torch.log1p(torch.exp(hardest - logits[q, d])) for d in wanted]
            rows.append(torch.stack(each).mean())
        elif settings.kind == "sigmoid":
            x = logits[q] + settings.bias
            yes = [-torch.log(torch.sigmoid(x[d])) for d in wanted]
            no = [-torch.log(torch.sigmoid(-x[d])) for d in refused]
            rows.append(torch.stack(yes + no).sum())
        else:
            scored = [d for d in wanted + refused if not teacher[q, d].isnan()]
            t = torch.softmax(teacher[q, scored] / settings.temperature, dim=0)
            s = torch.softmax(logits[q, scored], dim=0)
            rows.append((t * (t / s).log()).sum())
    return torch.stack(rows).mean()


def plain_info_nce(logits, positives, ignored):
    rows = []
    for row, wanted, left_out in zip(logits, positives, ignored, strict=True):
        refused = row[~(wanted | left_out)]
        each = [
            F.cross_entropy(torch.cat([p[None], refused])[None], torch.tensor([0]))
            for p in row[wanted]
        ]
        if each:
            rows.append(torch.stack(each).mean())
    return torch.stack(rows).mean()


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_equals_its_definition_forward_and_backward(kind, seed):
    problem = make_problem(kind, seed)
    plain = plainly(problem)
    torch.testing.assert_close(problem.loss(), plain, rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(plain, problem.scores)
    torch.testing.assert_close(problem.gradient(), gradient, rtol=1e-8, atol=1e-11)


def test_the_gradient_is_that_of_the_loss(problem):
    assert torch.autograd.gradcheck(problem.loss, problem.scores)


def test_the_order_of_queries_and_documents_never_matters(problem):
    rows = torch.tensor([4, 2, 0, 5, 1, 3])
    columns = torch.tensor([8, 3, 1, 0, 7, 5, 2, 6, 4])
    turned = problem.changed(lambda matrix: matrix[rows][:, columns])
    assert_same(turned, problem)
    torch.testing.assert_close(turned.gradient(), problem.gradient()[rows][:, columns])


@pytest.mark.parametrize("value", [-1e30, -math.inf, math.inf, math.nan])
def test_the_score_of_an_ignored_document_never_matters(problem, value):
    loss, gradient = problem.loss(), problem.gradient()
    with torch.no_grad():
        problem.scores[problem.ignored] = value
    torch.testing.assert_close(problem.loss(), loss)
    torch.testing.assert_close(problem.gradient(), gradient)
    assert (problem.gradient()[problem.ignored] == 0).all()


def test_a_document_that_all_ignore_is_as_good_as_absent(problem):
    def appended(matrix):
        value = True if matrix is problem.ignored else 0.0
        return F.pad(matrix, (0, 1), value=value)

    longer = problem.changed(appended)
    without = {"spread", "masked"}  # these two are of all documents
    assert_same(longer, problem, without)
    torch.testing.assert_close(longer.gradient()[:, :-1], problem.gradient())


def test_a_query_that_ignores_everything_is_as_good_as_absent(problem):
    rows = torch.tensor([0, 1, 3, 4, 5])
    fewer = problem.changed(lambda matrix: matrix[rows])
    assert_same(fewer, problem)
    torch.testing.assert_close(fewer.gradient(), problem.gradient()[rows])
    assert (problem.gradient()[2] == 0).all()


def assert_same(mine, theirs, without=()):
    mine, theirs = mine.summary(), theirs.summary()
    for name in set(mine.__slots__) - set(without):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), msg=name)


@pytest.mark.parametrize("kind", ["info_nce", "pairwise", "distillation"], indirect=True)
def test_a_constant_added_to_a_query_changes_nothing(problem):
    shift = torch.arange(6.0, dtype=torch.float64)[:, None] * 3
    moved = Problem((problem.scores + shift).detach().requires_grad_(), *problem.arguments[1:])
    torch.testing.assert_close(moved.loss(), problem.loss())
    torch.testing.assert_close(moved.gradient(), problem.gradient())


def test_no_step_of_the_backward_pass_is_nan_where_nothing_is_compared(problem):
    for matrix in (problem.scores.detach(), problem.teacher):
        if matrix is not None:
            matrix[2] = math.nan
    with torch.autograd.set_detect_anomaly(True):
        assert problem.gradient().isfinite().all()


def test_scores_in_half_precision_are_summed_in_float32(problem):
    rounded = problem.scores.detach().bfloat16()
    loss = problem.loss(rounded)
    assert loss.dtype == torch.float32 or problem.teacher is not None
    torch.testing.assert_close(loss, problem.loss(rounded.float()), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_huge_scores_stay_finite_forward_and_backward(problem, scale):
    loud = Problem(
        (problem.scores.float() * scale).detach().requires_grad_(), *problem.arguments[1:]
    )
    assert loud.loss().isfinite()
    assert loud.gradient().isfinite().all()


def test_nothing_is_fetched_from_the_device(problem):
    meta = [
        part.to("meta") if isinstance(part, torch.Tensor) else part for part in problem.arguments
    ]
    summary = contrastive_loss(*meta, score_range=RANGE)  # a value asked for would raise
    assert all(getattr(summary, name).is_meta for name in summary.__slots__)


def test_symmetric_is_the_mean_of_both_cross_entropies():
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets, positives = torch.arange(5), torch.eye(5, dtype=torch.bool)
    mine = info_nce(scores, positives, torch.zeros_like(positives), LossSettings(symmetric=True))
    both = (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets)) / 2
    torch.testing.assert_close(mine.loss, both)


def test_a_hard_negative_pushes_in_one_direction_only():
    """A document that nobody wants asks for no query."""
    problem = make_problem("symmetric")
    one_way = info_nce(*problem.arguments[:3], KINDS["info_nce"]).loss
    (gradient,) = torch.autograd.grad(one_way, problem.scores)
    torch.testing.assert_close(problem.gradient()[:, -2:], gradient[:, -2:] / 2)


def test_a_document_that_every_query_wants_pays_nothing():
    positives = torch.tensor([[True, False], [True, False]])
    scores = torch.zeros(2, 2, requires_grad=True)
    settings = LossSettings(symmetric=True)
    summary = info_nce(scores, positives, torch.zeros_like(positives), settings)
    assert summary.loss.item() == pytest.approx(math.log(2) / 2)
    torch.testing.assert_close(summary.loss.detach(), summary.chance)


def test_pairwise_moves_the_hardest_negative_alone_and_ties_share():
    positives = torch.tensor([[True, False, False, False]])
    scores = torch.tensor([[0.0, 2.0, 1.0, 2.0]], requires_grad=True)
    settings = LossSettings(kind="pairwise")
    contrastive_loss(scores, positives, torch.zeros_like(positives), settings).loss.backward()
    first, second, third, fourth = scores.grad[0].tolist()
    assert third == 0
    assert second == fourth == pytest.approx(-first / 2)


@pytest.mark.parametrize("kind", ["info_nce", "symmetric", "pairwise", "sigmoid"], indirect=True)
def test_a_positive_never_pushes_another_away(problem):
    assert (problem.positives.sum(dim=1) > 1).any()
    assert (problem.gradient()[problem.positives] < 0).all()


def test_a_student_that_agrees_with_its_teacher_pays_nothing():
    problem = make_problem("distillation")
    agreeing = problem.teacher.nan_to_num(7.0) + 3.0
    student = Problem(agreeing.requires_grad_(), *problem.arguments[1:])
    torch.testing.assert_close(student.loss(), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(student.gradient(), torch.zeros_like(agreeing))


def test_candidates_are_those_that_the_loss_compares():
    positives = torch.tensor([[True, False, False, False, False]])
    ignored = torch.tensor([[False, False, False, False, True]])
    scores, teacher = torch.zeros(1, 5), torch.tensor([[1.0, math.nan, 2.0, math.nan, 1.0]])
    plain = contrastive_loss(scores, positives, ignored, LossSettings())
    taught = contrastive_loss(scores, positives, ignored, KINDS["distillation"], teacher)
    assert (plain.candidates, taught.candidates) == (4, 2)
    assert (plain.masked, taught.masked) == (1, 1)


def test_teacher_scores_belong_to_distillation_and_to_nothing_else():
    scores, masks = torch.zeros(2, 3), torch.eye(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="kind is distillation, teacher scores are missing"):
        contrastive_loss(scores, masks, ~masks, KINDS["distillation"])
    with pytest.raises(ValueError, match="kind is pairwise, teacher scores are given"):
        contrastive_loss(scores, masks, ~masks, KINDS["pairwise"], scores)
    with pytest.raises(ValueError, match="settings of kind pairwise"):
        info_nce(scores, masks, ~masks, KINDS["pairwise"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "pairwise", "symmetric": True}, "symmetric is for kind info_nce, not pairwise"),
        ({"bias": -3.0}, "bias -3.0 is for kind sigmoid, not info_nce"),
        ({"kind": "distillation", "bias": 1.0}, "bias 1.0 is for kind sigmoid"),
        ({"temperature": math.inf}, "finite"),
        ({"kind": "hinge"}, "info_nce"),
    ],
)
def test_a_setting_that_the_kind_does_not_use_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LossSettings(**values)


def test_info_nce_is_taken_in_either_spelling():
    assert LossSettings.model_validate({"kind": "infonce"}) == LossSettings(kind="info_nce")
