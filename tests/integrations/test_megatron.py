"""The output processor for Megatron's GPTModel: on stand-ins with its exact signatures, and on an installed Megatron."""

import inspect
import sys
from importlib.util import find_spec

import megatron_ranks
import megatron_stubs
import pytest
import torch
from compare import assert_near
from two_ranks import start

import topd
from topd.integrations.megatron import DistillationContext, output_head, output_processor

V, PADDED = megatron_ranks.V, megatron_ranks.PADDED


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    for name, module in megatron_stubs.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def context_of(given, **options):
    head = topd.Head(given["teacher_weight"][:V].clone())
    return DistillationContext(given["teacher_hidden"], head, vocab=V, **options)


def call(model, given, context, **arguments):
    calls = {"output_processor": output_processor, "output_processor_context": context}
    return model(None, None, None, given["hidden"], given["labels"], **calls, **arguments)


def eager(given, factor, hard_weight):
    """Return reverse KL + cross-entropy [b, s] in full logits, 0 where the mask is."""
    student = (factor * given["hidden"] @ given["weight"][:V].T).log_softmax(-1)
    teacher = (given["teacher_hidden"] @ given["teacher_weight"][:V].T).log_softmax(-1)
    value = (student.exp() * (student - teacher)).sum(-1).T
    token = student.transpose(0, 1).gather(-1, given["labels"].unsqueeze(-1))[..., 0]
    return (value - hard_weight * token) * given["mask"].bool()


def truth():
    given = megatron_ranks.problem()
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    value = eager(given, 1.5, 0.3)
    (value * given["mask"] / 7).sum().backward()
    return {"value": value.detach(), "hidden": hidden.grad, "weight": weight.grad}


def test_the_loss_of_one_process_is_that_of_full_logits():
    given, true = megatron_ranks.problem(), truth()
    layer = megatron_stubs.ColumnParallelLinear(given["weight"])
    given["hidden"].requires_grad_()
    context = context_of(given, hard_weight=0.3)
    value = call(megatron_stubs.GPTModel(layer, factor=1.5), given, context, loss_mask=given["mask"])
    (value * given["mask"] / 7).sum().backward()
    assert value.shape == given["labels"].shape
    assert_near(value, true["value"], 1e-12)
    assert_near(given["hidden"].grad, true["hidden"], 1e-12)
    assert_near(layer.weight.grad, true["weight"], 1e-12)
    assert not layer.weight.grad[V:].any()


def test_a_shared_weight_takes_the_layers_place():
    given = megatron_ranks.problem()
    layer = megatron_stubs.ColumnParallelLinear(given["weight"] + 1)
    shared = given["weight"].clone().requires_grad_()
    call(megatron_stubs.GPTModel(layer, shared), given, context_of(given)).sum().backward()
    assert layer.weight.grad is None
    assert shared.grad[:V].any()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start("integrations/megatron_ranks.py", tmp_path_factory.mktemp("ranks"), timeout=120)


@pytest.mark.parametrize("name", ["plain", "teacher cut elsewhere", "sequence", "sequence, all of the teacher's rows"])
def test_two_ranks_are_one_process(ranks, name):
    true, parts = truth(), [rank[name] for rank in ranks]
    assert torch.equal(parts[0]["value"], parts[1]["value"])
    assert_near(parts[0]["value"], true["value"], 1e-12)
    assert_near(torch.cat([part["weight"] for part in parts]), true["weight"], 1e-12)
    hidden = torch.cat([part["hidden"] for part in parts]) if name.startswith("sequence") else parts[0]["hidden"]
    assert_near(hidden, true["hidden"], 1e-12)


class WithoutTheHook(torch.nn.Module):
    def forward(self, input_ids, position_ids, attention_mask, labels=None, *, loss_mask=None):
        """As in megatron-core 0.17."""


def test_a_megatron_without_the_hook_is_named(monkeypatch):
    for name, module in megatron_stubs.modules("0.17.1", WithoutTheHook).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ImportError, match=r"knows megatron-core 0\.18 to .*megatron-core 0\.17\.1 .*has no output_processor"):
        context_of(megatron_ranks.problem())


def test_a_call_with_other_names_is_named():
    given = megatron_ranks.problem()
    layer = megatron_stubs.ColumnParallelLinear(given["weight"])
    with pytest.raises(TypeError, match=r"megatron-core 0\.18 to .*megatron-core 0\.19\.2 .*has no output_weight, labels"):
        output_processor(
            hidden_states=given["hidden"],
            output_layer=layer,
            target=None,
            loss_mask=None,
            context=context_of(given),
            scale_logits=lambda logits: logits,
            config=None,
        )


def test_without_megatron_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.models.gpt.gpt_model", None)
    with pytest.raises(ImportError, match=r"needs megatron-core 0\.18"):
        context_of(megatron_ranks.problem())


class Capped(megatron_stubs.ColumnParallelLinear):
    def forward(self, input_, weight=None, runtime_gather_output=None):
        """Whatever it does to logits."""


def refusals():
    given = megatron_ranks.problem()
    layer = megatron_stubs.ColumnParallelLinear(given["weight"])
    plain, context = megatron_stubs.GPTModel(layer), context_of(given)
    shared = megatron_stubs.ColumnParallelLinear(given["weight"])
    shared.weight = None
    crooked = megatron_stubs.GPTModel(layer)
    crooked._scale_logits = torch.tanh
    model = megatron_stubs.GPTModel
    return {
        "another context": (
            lambda: call(plain, given, {}),
            "must be a topd.integrations.megatron.DistillationContext, got dict",
        ),
        "a layer of its own": (lambda: call(model(Capped(given["weight"])), given, context), "say so with softcap="),
        "a wrapped layer": (
            lambda: call(model(torch.nn.Identity()), given, context),
            "a LoRA on the output layer is not taken",
        ),
        "deferred": (lambda: call(model(layer, defer_embedding_wgrad_compute=True), given, context), "leave it off"),
        "no weight": (lambda: output_head(shared, vocab=V), "shared_embedding_or_output_weight"),
        "too many tokens": (lambda: output_head(layer, vocab=41), "at most the 40 rows"),
        "no factor": (lambda: call(crooked, given, context), "must multiply logits by one number"),
        "flat states": (lambda: DistillationContext(torch.ones(3, 4), context.teacher, vocab=V), r"must be \[s, b, h_t\]"),
    }


def test_refusals():
    for refused, message in refusals().values():
        with pytest.raises((TypeError, ValueError), match=message):
            refused()


def test_a_softcap_that_is_said_is_taken():
    given = megatron_ranks.problem()
    value = call(megatron_stubs.GPTModel(Capped(given["weight"])), given, context_of(given, softcap=2.0))
    student = topd.Head(given["weight"][:V], softcap=2.0)
    teacher = topd.Head(given["teacher_weight"][:V])
    expected = topd.linear_divergence(given["hidden"], student, given["teacher_hidden"], teacher)
    assert_near(value, expected.T, 1e-12)


def test_the_processor_takes_what_megatron_gives_by_name():
    taken = {name for name, one in inspect.signature(output_processor).parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert {"hidden_states", "output_layer", "output_weight", "labels", "context", "config"} <= taken


WITHOUT_MEGATRON = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


@pytest.fixture(scope="module", params=[1, 2])
def real(request, tmp_path_factory):
    """What a GPTModel of the installed Megatron returned on so many ranks."""
    return start("integrations/real_megatron.py", tmp_path_factory.mktemp("real"), timeout=240, ranks=request.param)


@WITHOUT_MEGATRON
def test_the_stand_ins_have_the_signature_of_the_installed_megatron(real):
    stub = inspect.signature(megatron_stubs.GPTModel.forward)
    assert real[0]["forward"] == [(name, one.kind.name) for name, one in stub.parameters.items()]
    assert real[0]["loaded"].startswith(("0.18", "0.19", "0.20"))


@WITHOUT_MEGATRON
def test_a_real_gpt_model_returns_what_its_own_logits_give(real):
    for case in (case for rank in real for case in rank["cases"].values()):
        assert_near(case["value"], case["true_value"], 2e-5, "value")
        assert set(case["grads"]) == set(case["true_grads"])
        for name, grad in case["true_grads"].items():
            assert_near(case["grads"][name], grad, 2e-5, name)
