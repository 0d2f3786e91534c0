"""topd.linear_divergence and topd.score_tokens: values, scores and gradients in every ordinary case."""

import math
from dataclasses import replace

import compare
import pytest
import torch
from compare import DIVERGENCES, OPTIONS, by_topd, plain, random_model, random_problem
from score_truth import true_scores

import topd

LOG2, LOG3 = math.log(2), math.log(3)


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_float64_value_and_gradients(divergence, options, backend, device):
    problem = random_problem(options, divergence).to(device)
    upstream = torch.randn(11, dtype=torch.float64, device=device)
    compare.assert_outcome(by_topd(problem, backend, upstream), plain(problem, upstream), 1e-11)


DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("pair", ["f32 f32", "bf16 bf16", "f16 f16", "bf16 f32", "f32 bf16", "f16 bf16", "f32 f64"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_no_worse_than_eager_at_the_dtype(divergence, pair, backend, device):
    """Student and teacher dtypes, mixed too; the truth is that of the rounded inputs."""
    student, teacher = (DTYPES[name] for name in pair.split())
    problem = random_problem({"student": {"bias": True}, "hard_weight": 0.1}, divergence, n=64, vocab=300).to(device)
    problem = replace(problem, student=problem.student.to(student), teacher=problem.teacher.to(teacher))
    upstream = torch.randn(64, device=device)
    outcome, yardstick = by_topd(problem, backend, upstream), plain(problem, upstream, dtype=None)
    truth = plain(problem, upstream)
    compare.assert_no_worse(outcome.value, yardstick.value, truth.value, compare.CONSTANT, "value")
    for name, true in truth.grads.items():
        what = f"gradient of {name}"
        compare.assert_no_worse(outcome.grads[name], yardstick.grads[name], true, compare.CONSTANT, what)


@pytest.mark.parametrize("vocab", [2, 13, 1000, 4099])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_odd_vocabularies(divergence, vocab, backend, device):
    """A wrong block edge shows at once in float64; float32 may have other blocks."""
    problem = random_problem({}, divergence, n=5, vocab=vocab).to(device)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        problem, upstream = problem.to(dtype), torch.randn(5, device=device)
        compare.assert_outcome(by_topd(problem, backend, upstream), plain(problem, upstream), tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_vocabulary_of_one_is_exactly_zero(divergence, backend, device):
    outcome = by_topd(random_problem({}, divergence, n=5, vocab=1).to(device), backend, torch.randn(5, device=device))
    assert not outcome.value.any()
    assert not any(grad.any() for grad in outcome.grads.values())


SHAPES = {
    "flat": lambda hidden: hidden.reshape(-1, hidden.shape[-1]),
    "all_but_the_last_column": lambda hidden: hidden[:, :-1],
    "every_second_column": lambda hidden: hidden[:, ::2],
    "transposed": lambda hidden: hidden.transpose(0, 1),
    "one_row_expanded": lambda hidden: hidden[:, :1].expand(-1, 6, -1),
    "one_token": lambda hidden: hidden[0, 0],
}


@pytest.mark.parametrize("view", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_and_strides(view, backend, device):
    """Any leading shape and any strides of both hidden states and weights; gradients reach the base tensors."""
    student, teacher = (random_model((3, 6), 23, width).to(device) for width in (8, 5))
    weight, teacher_weight = student.weight.T.contiguous(), teacher.weight.T.contiguous()

    def outcome(compute):
        base, columns = student.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        seen = replace(student, hidden=view(base), weight=columns.T)
        value = compute(seen, replace(teacher, hidden=view(teacher.hidden), weight=teacher_weight.T))
        (value * torch.linspace(-1, 2, value.numel(), dtype=value.dtype, device=device).view(value.shape)).sum().backward()
        return compare.Outcome(value.detach(), {"hidden": base.grad, "weight": columns.grad})

    ours = outcome(lambda s, t: topd.linear_divergence(s.hidden, s.head(), t.hidden, t.head(), backend=backend))
    truth = outcome(
        lambda s, t: compare.row_divergence(topd.ReverseKL(), s.logits().log_softmax(-1), t.logits().log_softmax(-1))
    )
    assert ours.value.shape == view(student.hidden).shape[:-1]
    compare.assert_outcome(ours, truth, 1e-11)


def test_batch_of_rows_with_mask_and_tokens(backend, device):
    """[B, T] masks, tokens and scores index the same rows as [N] ones."""
    flat = random_problem({"mask": True, "hard_weight": 0.5}, n=12).to(device)
    shaped = replace(
        flat,
        student=replace(flat.student, hidden=flat.student.hidden.view(3, 4, -1)),
        teacher=replace(flat.teacher, hidden=flat.teacher.hidden.view(3, 4, -1)),
        mask=flat.mask.view(3, 4),
        tokens=flat.tokens.view(3, 4),
    )
    upstream = torch.randn(3, 4, dtype=torch.float64, device=device)
    compare.assert_outcome(by_topd(shaped, backend, upstream), plain(shaped, upstream), 1e-11)


@pytest.mark.parametrize("rows", [0, 9])
def test_nothing_to_do_gives_zeros_with_zero_gradients(rows, backend, device):
    """N = 0, and an all-False mask over rows of NaN."""
    problem = random_problem({"student": {"bias": True, "rank": 2}, "hard_weight": 1.0}, n=rows).to(device)
    mask, tokens = torch.zeros(2, rows, dtype=torch.bool, device=device)
    problem = replace(problem, mask=mask, tokens=tokens.long() - 100)
    for model in (problem.student, problem.teacher):
        model.hidden.fill_(math.nan)
    sides = problem.student.hidden, problem.student.head(), problem.teacher.hidden, problem.teacher.head()
    value, scores = topd.linear_divergence(*sides, **problem.options(), return_scores=True, backend=backend)
    assert torch.equal(value, torch.zeros(rows, dtype=torch.float64, device=device))
    assert all(not field.any() and field.shape == (rows,) for field in vars(scores).values())
    grads = by_topd(problem, backend, torch.ones(rows, device=device)).grads
    for name, grad in grads.items():
        assert grad is not None, name
        assert torch.equal(grad, torch.zeros_like(getattr(problem.student, name))), name


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_chunk_plans_agree_and_each_repeats_itself(divergence, backend, device):
    """From a row a chunk to all rows in one; for one plan value, scores and gradients are bitwise the same again."""
    options = {"student": {"bias": True, "rank": 2}, "mask": True, "hard_weight": 0.2}
    problem = random_problem(options, divergence, n=37, vocab=1000).to(device).to(torch.float32)
    upstream = torch.randn(37, device=device)
    truth = plain(problem, upstream)
    for workspace_bytes in (80_000, 200_000, 1_000_000, None):
        first, again = (by_topd(problem, backend, upstream, workspace_bytes=workspace_bytes) for _ in range(2))
        compare.assert_outcome(first, truth, 2e-5)
        assert torch.equal(first.value, again.value)
        assert all(torch.equal(grad, again.grads[name]) for name, grad in first.grads.items())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_scores(options, backend, device):
    """All nine fields, shaped, typed and constant, beside a clipped loss that does not touch them."""
    problem = random_problem(options, topd.ForwardKL(entry_clip=0.01)).to(device)
    student = problem.student.leaves(compare.TENSORS)
    sides = student.hidden, student.head(), problem.teacher.hidden, problem.teacher.head()
    value, scores = topd.linear_divergence(*sides, **problem.options(), return_scores=True, backend=backend)
    truth = true_scores(problem)
    assert vars(scores).keys() == truth.keys()
    assert torch.equal(scores.top1_agreement, truth.pop("top1_agreement"))
    for name, true in truth.items():
        compare.assert_near(getattr(scores, name), true, 1e-11, name)
        assert not getattr(scores, name).requires_grad
    assert value.requires_grad
    compare.assert_near(value.detach(), plain(problem).value, 1e-11, "value")


def test_scores_without_tokens_have_no_logprobs(backend, device):
    problem = random_problem({}).to(device)
    sides = problem.student.hidden, problem.student.head(), problem.teacher.hidden, problem.teacher.head()
    _, scores = topd.linear_divergence(*sides, return_scores=True, backend=backend)
    assert scores.student_logprob is None
    assert scores.teacher_logprob is None


def test_score_tokens_detaches_both_sides(device):
    """What linear_divergence refuses of a teacher is taken here, and nothing that comes back requires grad."""
    problem = random_problem({"student": {"rank": 2}, "teacher": {"bias": True}, "temperature": 2.0}).to(device)
    student, teacher = (model.leaves(compare.TENSORS) for model in (problem.student, problem.teacher))
    scores = topd.score_tokens(
        student.hidden, student.head(), teacher.hidden, teacher.head(), tokens=problem.tokens, temperature=2.0
    )
    truth = true_scores(problem)
    assert torch.equal(scores.top1_agreement, truth.pop("top1_agreement"))
    for name, true in truth.items():
        compare.assert_near(getattr(scores, name), true, 1e-11, name)
        assert not getattr(scores, name).requires_grad


FROZEN = [(), ("hidden",), ("weight",), ("bias",), ("a", "b"), ("a",), ("b",), ("hidden", "a", "b"), ("weight", "bias")]


@pytest.mark.parametrize("trainable", FROZEN, ids="+".join)
def test_only_what_is_trainable_has_gradients(trainable, backend, device):
    problem = random_problem({"student": {"bias": True, "rank": 2}, "mask": True, "hard_weight": 0.1}).to(device)
    truth = plain(problem, torch.arange(11.0, device=device), trainable=trainable or ("hidden",))
    if trainable:
        outcome = by_topd(problem, backend, torch.arange(11.0, device=device), trainable=trainable)
        compare.assert_outcome(outcome, truth, 1e-11)
    else:
        sides = problem.student.hidden, problem.student.head(), problem.teacher.hidden, problem.teacher.head()
        assert not topd.linear_divergence(*sides, **problem.options(), backend=backend).requires_grad


def test_autocast_casts_both_sides_as_linear_does(backend, device):
    """Under bfloat16 autocast float32 operands give what their bfloat16 copies give; gradients come back in float32."""
    options = {"student": {"bias": True, "rank": 2}, "teacher": {"bias": True}}
    problem = random_problem(options, n=16).to(device).to(torch.float32)
    upstream = torch.randn(16, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outcome = by_topd(problem, backend, upstream)
    explicit = by_topd(problem.to(torch.bfloat16), backend, upstream)
    assert outcome.value.dtype == torch.float32
    assert torch.equal(outcome.value, explicit.value)
    for name, grad in outcome.grads.items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, explicit.grads[name].float()), name


def test_autocast_leaves_float64_alone(backend, device):
    problem = random_problem({}).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outcome = by_topd(problem, backend)
    compare.assert_outcome(outcome, plain(problem), 1e-11)
