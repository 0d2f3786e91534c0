"""topd.entropy_aware_opd: the reverse KL, and where the teacher is undecided the forward KL to its likeliest tokens."""

import math
from dataclasses import replace

import compare
import pytest
import torch
from compare import CONSTANT, Model, Outcome, outcome_of, random_model

import topd

N, V = 11, 41


def from_logits(
    student: Model, teacher: Model, *, top_k=16, entropy_threshold=0.8, coef=1.0, temperature=1.0, mask=None
) -> torch.Tensor:
    """KL(p_S || p_T) + coef 1[H(p_T) >= threshold] sum over the top k of t (log t - log p_S), t the teacher renormalised on
    them; all on the common vocabulary."""
    vocab = min(student.weight.shape[0], teacher.weight.shape[0])
    logits = [model.logits()[..., :vocab] for model in (student, teacher)]
    dtype = torch.promote_types(torch.promote_types(logits[0].dtype, logits[1].dtype), torch.float32)
    log_s, log_t = ((each.to(dtype) / temperature).log_softmax(-1) for each in logits)
    value = (log_s.exp() * (log_s - log_t)).sum(-1)
    top, ids = log_t.topk(top_k, dim=-1)
    t = top.softmax(-1)
    guidance = (t * (t.log() - log_s.gather(-1, ids))).sum(-1)
    undecided = -(log_t.exp() * log_t).sum(-1) >= entropy_threshold
    value = value + coef * guidance.masked_fill(~undecided, 0.0)
    return value if mask is None else value.masked_fill(~mask, 0.0)


def truth(student: Model, teacher: Model, *, dtype: torch.dtype | None = torch.float64, **options) -> Outcome:
    teacher = teacher if dtype is None else teacher.to(dtype)
    return outcome_of(student, dtype, lambda leaves: from_logits(leaves, teacher, **options))


def by_topd(student: Model, teacher: Model, **options) -> Outcome:
    return outcome_of(
        student,
        None,
        lambda leaves: topd.entropy_aware_opd(leaves.hidden, leaves.head(), teacher.hidden, teacher.head(), **options),
    )


def sides(device, *, n: int | tuple[int, ...] = N, student_vocab: int = V, teacher_vocab: int = V, **options):
    return random_model(n, student_vocab, 7, **options).to(device), random_model(n, teacher_vocab, 5, **options).to(device)


def entropies(teacher: Model) -> torch.Tensor:
    log_t = teacher.logits().log_softmax(-1)
    return -(log_t.exp() * log_t).sum(-1)


def test_literal_value(backend):
    """p_S = (1/4, 1/4, 1/2); a teacher of (1/2, 1/4, 1/4), of whom the top token is asked for, H = 1.5 log 2 = 1.04; and one
    of (8, 1, 1) / 10, H = 0.64, who is decided."""
    student = topd.Head(torch.tensor([[1.0], [1], [2]]).double().log())
    hidden = torch.ones(2, 1, dtype=torch.float64)
    teacher = topd.Head(torch.tensor([[2.0, 8], [1, 1], [1, 1]]).double().log())
    teacher_hidden = torch.eye(2, dtype=torch.float64)
    value = topd.entropy_aware_opd(hidden, student, teacher_hidden, teacher, top_k=1, coef=0.5, backend=backend)
    log = math.log
    undecided = 1 / 4 * log(1 / 2) + 1 / 2 * log(2) + 0.5 * log(4)
    decided = 1 / 4 * log(0.25 / 0.8) + 1 / 4 * log(0.25 / 0.1) + 1 / 2 * log(0.5 / 0.1)
    torch.testing.assert_close(value, torch.tensor([undecided, decided], dtype=torch.float64), rtol=1e-12, atol=0)


CASES = {
    "defaults": ({}, {}),
    "top_k 3, coef 0.3": ({}, {"top_k": 3, "coef": 0.3}),
    "top_k is the vocabulary": ({}, {"top_k": V}),
    "threshold 0: every row": ({}, {"entropy_threshold": 0.0}),
    "temperature": ({}, {"temperature": 1.7, "top_k": 5}),
    "student larger": ({"student_vocab": 53}, {"top_k": V}),
    "teacher larger": ({"teacher_vocab": 53}, {"top_k": 9}),
    "heads": ({"bias": True, "rank": 2, "softcap": 8.0, "scale": 0.7, "teacher_vocab": 47}, {"temperature": 0.8}),
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("models", "options"), CASES.values(), ids=CASES.keys())
def test_float64_value_and_gradients(models, options, masked, backend, device):
    student, teacher = sides(device, **models)
    if masked:
        options = options | {"mask": torch.rand(N, device=device) < 0.6}
    outcome = by_topd(student, teacher, backend=backend, **options)
    compare.assert_outcome(outcome, truth(student, teacher, **options), 1e-11)


def test_the_cases_have_rows_on_both_sides_of_the_threshold():
    entropy = entropies(sides("cpu")[1])
    assert 2 <= (entropy >= 0.8).sum() <= N - 2


def test_the_top_k_of_a_larger_teacher_is_that_of_the_common_vocabulary(backend, device):
    """The teacher's likeliest tokens are beyond the student's vocabulary, and must not be asked of it."""
    student, teacher = sides(device, teacher_vocab=53, bias=True)
    teacher.bias[V:] += 30
    options = {"top_k": 4, "entropy_threshold": 0.1}
    outcome = by_topd(student, teacher, backend=backend, **options)
    compare.assert_outcome(outcome, truth(student, teacher, **options), 1e-11)


@pytest.mark.parametrize("options", [{"coef": 0.0}, {"coef": 0}, {"entropy_threshold": math.log(V) + 0.1}], ids=str)
def test_without_guidance_it_is_the_reverse_kl(options, backend, device):
    student, teacher = sides(device, bias=True)
    temperature = {"temperature": 1.3}
    outcome = by_topd(student, teacher, backend=backend, **options, **temperature)
    expected = outcome_of(
        student,
        None,
        lambda leaves: topd.linear_divergence(
            leaves.hidden, leaves.head(), teacher.hidden, teacher.head(), backend=backend, **temperature
        ),
    )
    compare.assert_outcome(outcome, expected, 1e-14)


def test_without_guidance_a_token_that_the_student_excludes_costs_nothing(backend, device):
    """Its reverse KL is finite, and 0 times an infinite forward KL must not make it NaN."""
    student, teacher = sides(device, bias=True)
    student.bias[2] = -math.inf
    options = {"top_k": V, "entropy_threshold": 0.0}
    outcome = by_topd(student, teacher, coef=0.0, backend=backend, **options)
    log_s, log_t = student.logits().log_softmax(-1), teacher.logits().log_softmax(-1)
    expected = torch.where(log_s.isneginf(), 0.0, log_s.exp() * (log_s - log_t)).sum(-1)
    compare.assert_near(outcome.value, expected, 1e-11, "value")
    assert all(gradient.isfinite().all() for gradient in outcome.grads.values())


def test_a_row_at_the_threshold_is_undecided(backend):
    """A uniform teacher of 4 tokens has the entropy log 4 exactly, in any arithmetic."""
    student, teacher = sides("cpu", student_vocab=4, teacher_vocab=4)
    teacher = replace(teacher, weight=torch.zeros_like(teacher.weight))
    entropy = topd.score_tokens(student.hidden, student.head(), teacher.hidden, teacher.head()).teacher_entropy[0].item()
    assert entropy == pytest.approx(math.log(4), rel=1e-15)
    options = {"top_k": 2, "backend": backend}
    undecided = by_topd(student, teacher, entropy_threshold=entropy * (1 - 1e-12), **options).value
    above = by_topd(student, teacher, entropy_threshold=entropy * (1 + 1e-12), **options).value
    assert (undecided > above).all()


def undecided_or_not(device, dtype: torch.dtype) -> tuple[Model, Model]:
    """64 rows, of which no teacher's entropy lies within rounding of the threshold."""
    student, teacher = (model.to(dtype) for model in sides(device, n=64, student_vocab=300, teacher_vocab=300))
    assert (entropies(teacher.to(torch.float64)) - 0.8).abs().min() > 0.01
    return student, teacher


def test_no_worse_than_eager_in_float32(backend, device):
    student, teacher = undecided_or_not(device, torch.float32)
    options = {"top_k": 7}
    outcome, true = by_topd(student, teacher, backend=backend, **options), truth(student, teacher, **options)
    yardstick = truth(student, teacher, dtype=None, **options)
    compare.assert_no_worse(outcome.value, yardstick.value, true.value, CONSTANT, "value")
    for name, gradient in true.grads.items():
        compare.assert_no_worse(outcome.grads[name], yardstick.grads[name], gradient, CONSTANT, f"gradient of {name}")


def test_bfloat16(backend, device):
    """The value is no worse than eager's. Gradients come from two ops, each rounded to bfloat16, then added in bfloat16."""
    student, teacher = undecided_or_not(device, torch.bfloat16)
    options = {"top_k": 7}
    outcome, true = by_topd(student, teacher, backend=backend, **options), truth(student, teacher, **options)
    yardstick = truth(student, teacher, dtype=None, **options)
    compare.assert_no_worse(outcome.value, yardstick.value, true.value, CONSTANT, "value")
    for name, gradient in true.grads.items():
        compare.assert_near(outcome.grads[name], gradient, torch.finfo(torch.bfloat16).eps, f"gradient of {name}")


def test_masked_rows_are_exactly_zero_whatever_they_hold(backend, device):
    student, teacher = sides(device, n=(3, 4))
    mask = torch.rand(3, 4, device=device) < 0.5
    true = truth(student, teacher, mask=mask)
    for model in (student, teacher):
        model.hidden[~mask] = math.nan
    outcome = by_topd(student, teacher, mask=mask, backend=backend)
    compare.assert_outcome(outcome, true, 1e-11)
    assert not outcome.value[~mask].any()
    assert not outcome.grads["hidden"][~mask].any()


@pytest.mark.parametrize("hint", [[1.0, 0, 2, -1, 5], [0.0] * 5, [math.nan] * 5], ids=str)
def test_a_hint_never_changes_a_result(hint, backend, device):
    student, teacher = sides(device, n=5, bias=True)
    outcome = by_topd(student, teacher, weights_hint=torch.tensor(hint, device=device), backend=backend)
    compare.assert_outcome(outcome, truth(student, teacher), 1e-11)


def test_no_rows(backend, device):
    student, teacher = sides(device, n=0)
    outcome = by_topd(student, teacher, backend=backend)
    assert outcome.value.shape == (0,)
    assert torch.equal(outcome.grads["weight"], torch.zeros_like(student.weight))


def call(**changes):
    student, teacher = sides("cpu", n=2)
    given = {"student": student.head(), "teacher_hidden": teacher.hidden, "teacher": teacher.head()} | changes
    return topd.entropy_aware_opd(student.hidden, **given)


GRAD = torch.randn(V, 5, dtype=torch.float64).requires_grad_()
REFUSED = {
    "top_k large": ({"top_k": V + 1}, ValueError, ["top_k", f"{V}", f"{V + 1}"]),
    "top_k common": (
        {"top_k": V, "student": topd.Head(torch.ones(9, 7).double())},
        ValueError,
        ["top_k", "9", f"{V}"],
    ),
    "top_k 0": ({"top_k": 0}, ValueError, ["top_k", "> 0", "0"]),
    "top_k type": ({"top_k": 2.0}, TypeError, ["top_k", "int", "float"]),
    "threshold": ({"entropy_threshold": -0.1}, ValueError, ["entropy_threshold", ">= 0", "-0.1"]),
    "threshold nan": ({"entropy_threshold": math.nan}, ValueError, ["entropy_threshold", "finite", "nan"]),
    "coef": ({"coef": -1.0}, ValueError, ["coef", ">= 0", "-1.0"]),
    "coef type": ({"coef": None}, TypeError, ["coef", "number", "NoneType"]),
    "temperature": ({"temperature": 0.0}, ValueError, ["temperature", "> 0"]),
    "mask": ({"mask": torch.ones(2)}, TypeError, ["mask", "torch.bool", "torch.float32"]),
    "hint": ({"weights_hint": torch.ones(3)}, ValueError, ["weights_hint", "[2]", "[3]"]),
    "teacher grad": ({"teacher": topd.Head(GRAD)}, ValueError, ["teacher.weight", "require grad", "detach()"]),
    "teacher rows": ({"teacher_hidden": torch.ones(3, 5).double()}, ValueError, ["teacher_hidden", "[2, 5]", "[3, 5]"]),
    "student": ({"student": torch.ones(V, 7)}, TypeError, ["student", "topd.Head", "Tensor"]),
}


@pytest.mark.parametrize(("changes", "kind", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(changes, kind, words):
    with pytest.raises(kind) as caught:
        call(**changes)
    assert not [word for word in words if word not in str(caught.value)], caught.value


@pytest.mark.parametrize("doubled", ["student", "teacher"])
def test_one_side_of_float64_gives_all_parts_its_digits(doubled, backend, device):
    """Both parts are computed from float32 states and weights of one side and float64 ones of the other."""
    student, teacher = sides(device, bias=True, rank=2)
    student, teacher = (
        model if name == doubled else model.to(torch.float32).to(torch.float64)
        for name, model in (("student", student), ("teacher", teacher))
    )
    options = {"top_k": 5, "entropy_threshold": 0.0, "backend": backend}
    expected = truth(student, teacher, **{name: options[name] for name in ("top_k", "entropy_threshold")})
    narrow = {"student": student, "teacher": teacher}
    for name in narrow.keys() - {doubled}:
        narrow[name] = narrow[name].to(torch.float32)
    outcome = by_topd(narrow["student"], narrow["teacher"], **options)
    torch.testing.assert_close(outcome.value, expected.value, rtol=1e-12, atol=1e-12)
    rtol = 1e-10 if doubled == "student" else 1e-6  # gradients come back in the dtype of what they are of
    for name, true in expected.grads.items():
        torch.testing.assert_close(outcome.grads[name].double(), true, rtol=rtol, atol=rtol * true.abs().max().item())
