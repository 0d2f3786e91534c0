"""Forward-mode AD is refused in words, never answered by zero tangents."""

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from compare import TENSORS, Model, random_model
from torch import Tensor

import topd

N, V, M = 4, 9, 2
REFUSED = pytest.mark.parametrize("through", ["jvp", "jacfwd", "forward_ad"])


def student() -> Model:
    return random_model(N, V, 5, bias=True, rank=2)


TEACHER = {
    name: torch.randn(size, 5, generator=torch.Generator().manual_seed(1)).double() for name, size in (("h", N), ("w", V))
}
IDS = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
PROBS = torch.full((N, M), 0.5, dtype=torch.float64)
CALLS: dict[str, Callable[[Model, str | None], Tensor]] = {
    "linear_divergence": lambda m, b: topd.linear_divergence(
        m.hidden, m.head(), TEACHER["h"], topd.Head(TEACHER["w"]), backend=b
    ),
    "linear_logprobs": lambda m, b: topd.linear_logprobs(m.hidden, m.head(), IDS, backend=b),
    "soft_target_kl": lambda m, b: topd.soft_target_kl(m.hidden, m.head(), IDS, PROBS, backend=b),
    "topk_divergence": lambda m, b: topd.topk_divergence(m.hidden, m.head(), IDS, PROBS.log() - 0.1, backend=b),
    "entropy_aware_opd": lambda m, b: topd.entropy_aware_opd(
        m.hidden, m.head(), TEACHER["h"], topd.Head(TEACHER["w"]), top_k=2, backend=b
    ),
    "guidance_kl": lambda m, b: topd.guidance_kl(m.hidden.unsqueeze(0), m.head(), IDS[:1], PROBS.unsqueeze(0), backend=b),
}


def forwards(through: str, f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    if through == "jvp":
        torch.func.jvp(f, (x,), (torch.ones_like(x),))
    elif through == "jacfwd":
        torch.func.jacfwd(f)(x)
    else:
        with forward_ad.dual_level():
            f(forward_ad.make_dual(x, torch.ones_like(x)))


@REFUSED
@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_of_the_hidden_states_is_refused(name, through):
    model = student()
    with pytest.raises(RuntimeError, match=r"topd.* no forward-mode derivative.*backward"):
        forwards(
            through, lambda hidden: CALLS[name](model.map(lambda n, v: hidden if n == "hidden" else v), None), model.hidden
        )


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("name", ["linear_divergence", "linear_logprobs"])
def test_a_tangent_of_any_tensor_is_refused(name, tensor, backend):
    model = student()
    with pytest.raises(RuntimeError, match=rf"topd.{name} has no forward-mode derivative"):
        forwards("jvp", lambda x: CALLS[name](model.map(lambda n, v: x if n == tensor else v), backend), getattr(model, tensor))


@pytest.mark.parametrize("tensor", ["h", "w"])
def test_a_tangent_of_the_teacher_is_refused(tensor):
    model = student()

    def value(x: Tensor) -> Tensor:
        h, w = (x if tensor == name else TEACHER[name] for name in ("h", "w"))
        return topd.linear_divergence(model.hidden, model.head(), h, topd.Head(w))

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        forwards("jvp", value, TEACHER[tensor])


@pytest.mark.parametrize("name", ["linear_divergence", "linear_logprobs"])
def test_a_tangent_of_the_upstream_gradient_is_refused(name, chunked):
    model = student().leaves(TENSORS)
    value = CALLS[name](model, chunked)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=rf"topd.{name} has no forward-mode derivative"):
        value.backward(forward_ad.make_dual(torch.ones_like(value), torch.ones_like(value)))


def test_scores_are_constants_and_carry_no_tangent():
    model = student()
    with forward_ad.dual_level():
        hidden = forward_ad.make_dual(model.hidden, torch.ones_like(model.hidden))
        scores = topd.score_tokens(hidden, model.head(), TEACHER["h"], topd.Head(TEACHER["w"]))
        assert forward_ad.unpack_dual(scores.reverse_kl).tangent is None
        assert scores.reverse_kl.isfinite().all()
