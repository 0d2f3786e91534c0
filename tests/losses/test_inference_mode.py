"""Teachers, masks and ids made under torch.inference_mode(): values and gradients as without it, or an error that names the
argument."""

from functools import partial

import pytest
import torch

import topd

B, T, H, V, M = 2, 5, 6, 11, 3


def problem():
    """Operands [B, T, ...] of every function, all constants."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    ids = torch.stack([torch.randperm(V, generator=generator)[:M] for _ in range(B * T)]).reshape(B, T, M)
    return {
        "student_hidden": normal(B, T, H),
        "student_weight": normal(V, H),
        "student_bias": normal(V),
        "teacher_hidden": normal(B, T, H),
        "teacher_weight": normal(V, H),
        "teacher_bias": normal(V),
        "a": normal(2, H),
        "b": normal(V, 2),
        "mask": torch.rand(B, T, generator=generator) > 0.3,
        "tokens": torch.randint(V, (B, T), generator=generator),
        "ids": ids,
        "probs": normal(B, T, M).softmax(-1),
        "hint": normal(B, T).abs(),
        "lengths": torch.tensor([3, 5]),
    }


SHAPES = {
    "unsliced": lambda value: value,
    "sliced": lambda value: value[:, 1:],
    "batch_of_one": lambda value: value[:1],
    "batch_of_one_sliced": lambda value: value[:1, :-1],
    "flat": lambda value: value.reshape(B * T, *value.shape[2:]),
}
ROWS = ("student_hidden", "teacher_hidden", "mask", "tokens", "ids", "probs", "hint")


def teacher_of(p):
    return topd.Head(p["teacher_weight"], p["teacher_bias"], adapter=topd.LowRank(p["a"], p["b"], 0.5))


def divergence(p, hidden, head, backend):
    options = {"mask": p["mask"], "tokens": p["tokens"], "hard_weight": 0.3, "weights_hint": p["hint"], "backend": backend}
    return topd.linear_divergence(hidden, head, p["teacher_hidden"], teacher_of(p), **options)


def logprobs(p, hidden, head, backend):
    value, entropy = topd.linear_logprobs(hidden, head, p["ids"], mask=p["mask"], return_entropy=True, backend=backend)
    return value.sum(-1) + entropy


def soft(p, hidden, head, backend):
    return topd.soft_target_kl(hidden, head, p["ids"], p["probs"], mask=p["mask"], backend=backend)


def top_k(p, hidden, head, backend, **options):
    return topd.topk_divergence(hidden, head, p["ids"], p["probs"].log() - 0.2, mask=p["mask"], backend=backend, **options)


def entropy_aware(p, hidden, head, backend):
    sides = (hidden, head, p["teacher_hidden"], teacher_of(p))
    return topd.entropy_aware_opd(*sides, top_k=3, mask=p["mask"], backend=backend)


FUNCTIONS = {
    "linear_divergence": divergence,
    "linear_logprobs": logprobs,
    "soft_target_kl": soft,
    "topk_divergence": top_k,
    "topk_raw_reverse": partial(top_k, direction="reverse", support="raw"),
    "entropy_aware_opd": entropy_aware,
}


def gradients(function, p, backend):
    """Value and gradients under weights that deviate from the hint, so that backward computes rows again."""
    hidden, weight, bias = (p[f"student_{name}"].clone().requires_grad_() for name in ("hidden", "weight", "bias"))
    value = function(p, hidden, topd.Head(weight, bias), backend)
    grads = torch.autograd.grad(
        (value * torch.linspace(0.5, 2, value.numel()).reshape(value.shape)).sum(), (hidden, weight, bias)
    )
    return value.detach(), *grads


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_constants_of_inference_mode_change_nothing(function, shape, backend):
    """Hidden states, a head loaded under it, its adapter, mask, tokens, ids and hint; whole, sliced, of one rollout."""
    ordinary = {name: SHAPES[shape](value) if name in ROWS else value for name, value in problem().items()}
    with torch.inference_mode():
        constants = {name: value.clone() for name, value in problem().items()}
        constants = {name: SHAPES[shape](value) if name in ROWS else value for name, value in constants.items()}
    with torch.inference_mode(False):
        student = {name: value for name, value in ordinary.items() if name.startswith("student")}
        expected = gradients(FUNCTIONS[function], ordinary, backend)
        assert constants["teacher_weight"].is_inference()
        results = gradients(FUNCTIONS[function], constants | student, backend)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_no_teacher_tensor_is_copied():
    """The weight [V, H] that backward keeps shares the teacher's storage."""
    with torch.inference_mode():
        weight, hidden = torch.randn(V, H), torch.randn(T, H)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        states = torch.randn(T, H, requires_grad=True)
        topd.linear_divergence(states, topd.Head(torch.randn(V, H)), hidden, topd.Head(weight), backend="eager")
    pointers = {tensor.data_ptr() for tensor in kept if tensor.numel()}
    assert {weight.data_ptr(), hidden.data_ptr()} <= pointers
    assert weight.is_inference()
    assert not any(tensor.is_inference() for tensor in kept)


def test_a_frozen_student_of_inference_mode_is_a_constant(backend):
    """States computed ahead train a head; a frozen head loaded under it passes gradients to the states."""
    p = problem()
    with torch.inference_mode():
        states, weight = p["student_hidden"].clone(), p["student_weight"].clone()
    teacher = (p["teacher_hidden"], teacher_of(p))
    trained = p["student_weight"].clone().requires_grad_()
    topd.linear_divergence(states, topd.Head(trained), *teacher, backend=backend).sum().backward()
    hidden = p["student_hidden"].clone().requires_grad_()
    topd.linear_divergence(hidden, topd.Head(weight), *teacher, backend=backend).sum().backward()
    both = hidden.detach().clone().requires_grad_(), trained.detach().clone().requires_grad_()
    topd.linear_divergence(both[0], topd.Head(both[1]), *teacher, backend=backend).sum().backward()
    torch.testing.assert_close(hidden.grad, both[0].grad)
    torch.testing.assert_close(trained.grad, both[1].grad)


@pytest.mark.parametrize("call", [divergence, logprobs], ids=["linear_divergence", "linear_logprobs"])
def test_what_shall_be_differentiated_is_refused_by_name(call):
    p = problem()
    prefix = "student_" if call is divergence else ""
    with torch.inference_mode():
        hidden, weight, bias = (p[f"student_{n}"].clone().requires_grad_() for n in ("hidden", "weight", "bias"))
    plain = p["student_hidden"].clone().requires_grad_()
    owner = "student" if call is divergence else "head"
    with pytest.raises(ValueError, match=f"{prefix}hidden must be made outside torch.inference_mode.* to be differentiated"):
        call(p, hidden, topd.Head(p["student_weight"]), None)
    with pytest.raises(ValueError, match=f"{owner}.weight must be made outside torch.inference_mode"):
        call(p, plain, topd.Head(weight), None)
    with pytest.raises(ValueError, match=f"{owner}.bias must be made outside torch.inference_mode"):
        call(p, plain, topd.Head(p["student_weight"], bias), None)


def test_inside_inference_mode_nothing_is_refused(backend):
    p = problem()
    expected = divergence(p, p["student_hidden"], topd.Head(p["student_weight"]), backend)
    with torch.inference_mode():
        hidden, weight = p["student_hidden"].clone().requires_grad_(), p["student_weight"].clone()
        value = divergence(p, hidden, topd.Head(weight), backend)
        scores = topd.score_tokens(hidden, topd.Head(weight), p["teacher_hidden"], teacher_of(p))
    assert torch.equal(value, expected)
    outside = topd.score_tokens(hidden, topd.Head(weight), p["teacher_hidden"], teacher_of(p))
    assert torch.equal(scores.reverse_kl, outside.reverse_kl)


def test_guidance_takes_plans_and_lengths_of_inference_mode():
    p = problem()
    with torch.inference_mode():
        plan, tokens, lengths = torch.rand(B, T, T), torch.randint(V, (B, T)), torch.tensor([3, 5])
        hint = torch.ones(B)
    grads = []
    for constants in ((tokens, plan, lengths, hint), tuple(value.clone() for value in (tokens, plan, lengths, hint))):
        hidden = p["student_hidden"].clone().requires_grad_()
        head = topd.Head(p["student_weight"])
        value = topd.guidance_kl(hidden, head, *constants[:2], student_lengths=constants[2], weights_hint=constants[3])
        value.sum().backward()
        grads.append(hidden.grad)
    assert torch.equal(*grads)


def test_sampled_kl_takes_logprobs_of_inference_mode():
    with torch.inference_mode():
        teacher = -torch.rand(T)
    for estimator in ("k1", "k2", "k3"):
        grads = []
        for constant in (teacher, teacher.clone()):
            student = (-torch.linspace(0.1, 1, T)).requires_grad_()
            topd.sampled_kl(student, constant, estimator=estimator).square().sum().backward()
            grads.append(student.grad)
        assert torch.equal(*grads)


def test_a_compiled_function_refuses_by_name():
    """torch.compile keeps the graph's inputs itself, and refuses inference tensors without saying which."""
    p = problem()
    with torch.inference_mode():
        teacher_hidden, weight = p["teacher_hidden"].clone(), p["teacher_weight"].clone()

    def loss(hidden, teacher_hidden, weight):
        head = topd.Head(p["student_weight"])
        return topd.linear_divergence(hidden, head, teacher_hidden, topd.Head(weight), backend="eager").sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    hidden = p["student_hidden"].clone().requires_grad_()
    with pytest.raises(ValueError, match=r"teacher_hidden must .* torch.compile, .* torch.no_grad\(\)"):
        compiled(hidden, teacher_hidden, p["teacher_weight"])
    with pytest.raises(ValueError, match=r"teacher_weight must .* torch.compile, .* torch.no_grad\(\)"):
        compiled(hidden, p["teacher_hidden"], weight)
    compiled(hidden, p["teacher_hidden"], p["teacher_weight"]).backward()
    assert hidden.grad.abs().max() > 0

    def logprob(hidden, weight):
        return topd.linear_logprobs(hidden, topd.Head(weight), p["ids"], backend="eager").sum()

    with pytest.raises(ValueError, match=r"weight must .* torch.compile, .* torch.no_grad\(\)"):
        torch.compile(logprob, fullgraph=True, backend="aot_eager")(hidden, weight)
