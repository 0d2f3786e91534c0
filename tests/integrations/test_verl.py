"""verl's FSDP engine with topd's losses: on stand-ins with its exact signatures, and on an installed verl."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
import verl_cases
import verl_stubs
from compare import assert_near
from two_ranks import start

import topd
from topd.integrations import verl
from topd.integrations.verl_rows import TeacherRows


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    for name, module in verl_stubs.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for registry in ("LOSSES", "SETTINGS", "ENGINES"):
        monkeypatch.setattr(verl_stubs, registry, {})


def step(batch, **options):
    """Return the model, its outputs and the response's losses of one forward, as verl's engine does it."""
    verl_stubs.ENGINES.clear()
    verl.register("topd", **options)
    ((_, engine_class),) = verl_stubs.ENGINES.items()
    engine = engine_class()
    engine.built, engine.model_config = verl_cases.student(), SimpleNamespace(use_fused_kernels=True)
    model = engine._build_module()
    model_inputs, output_args = engine.prepare_model_inputs(batch)
    output = model(**model_inputs, use_cache=False)
    model_output = engine.prepare_model_outputs(output, output_args, batch, None)
    losses, metrics = verl_stubs.LOSSES["topd"](
        config=None, distillation_config=verl_cases.distillation_config(), model_output=model_output, data=batch
    )
    return model, model_output, losses, metrics


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("topk", [True, False])
def test_losses_are_those_of_full_logits(divergence, topk):
    batch = verl_cases.batch() | verl_cases.FLAGS
    true = verl_cases.truth(verl_cases.student(), divergence, topk=topk)
    teacher = None if topk else verl_cases.teacher_head
    model, model_output, losses, metrics = step(batch, teacher=teacher, divergence=divergence)
    assert_near(losses, true["losses"], 1e-5)
    assert metrics["distillation/mean_nats"] == pytest.approx(float(true["losses"].sum()) / sum(verl_cases.RESPONSES), rel=1e-5)
    for name in ("log_probs", "entropy"):
        assert_near(verl_stubs.no_padding_2_padding(model_output[name], batch).detach(), true[name], 1e-5)
    losses.sum().backward()
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, true["grads"][name], 1e-4, name)


def test_a_loss_claims_a_topk_so_that_verl_lets_the_forward_compute_it():
    verl.register("mine", teacher=verl_cases.teacher_head, divergence="jsd")
    assert verl_stubs.SETTINGS["mine"].use_topk
    assert not verl_stubs.SETTINGS["mine"].use_estimator
    assert [key[1] for key in verl_stubs.ENGINES] == [("fsdp", "fsdp2")]


@pytest.mark.parametrize("number", [0, 1])
def test_the_pages_modules_register_a_loss(number):
    page = (Path(__file__).parents[2] / "docs" / "verl.md").read_text()
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[number], {})
    assert list(verl_stubs.LOSSES) == ["topd"]


def test_a_second_engine_is_refused():
    verl.register()
    with pytest.raises(ValueError, match=r"an FSDP engine for nvidia already.* call it once in a process"):
        verl.register("another")
    assert list(verl_stubs.LOSSES) == ["topd"]


def test_a_lora_is_taken():
    """PEFT's forward hands the engine's arguments on to the model's own."""
    peft = pytest.importorskip("peft")
    model, batch = verl_cases.student(), verl_cases.batch() | verl_cases.FLAGS
    model.forward = MethodType(verl.forward_with_topd, model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    rows = verl.rows_of(batch, verl_cases.teacher_head(), topd.ReverseKL(), ulysses=False)
    inputs, _ = verl_stubs.FSDPEngineWithLMHead().prepare_model_inputs(batch)
    output = wrapped(**inputs, use_cache=False, topd_rows=rows)
    losses = verl_stubs.no_padding_2_padding(
        torch.nested.nested_tensor_from_jagged(output.fused_linear_aux.distillation_losses[0], batch["input_ids"].offsets()),
        batch,
    )
    assert_near(losses.detach(), verl_cases.truth(verl_cases.student(), "reverse_kl", topk=False)["losses"], 1e-5)
    losses.sum().backward()
    grads = {name: parameter.grad for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert all("lora" in name for name in grads)
    assert any(grad.any() for grad in grads.values())


def test_no_logprobs_are_computed_where_verl_reads_none():
    flags = verl_cases.FLAGS | {"distillation_only": True, "calculate_entropy": False}
    _, model_output, losses, _ = step(verl_cases.batch() | flags, teacher=verl_cases.teacher_head)
    assert set(model_output) == {"distillation_losses", "student_mass", "teacher_mass"}
    assert losses.sum() > 0


def test_rows_that_predict_no_response_cost_nothing():
    """The teacher's states there are never read."""
    batch = verl_cases.batch() | verl_cases.FLAGS
    hidden = batch["teacher_hidden"].values()
    for first, prompt, last in zip(
        verl_cases.offsets_of(verl_cases.LENGTHS), verl_cases.PROMPTS, verl_cases.LENGTHS, strict=False
    ):
        hidden[first : first + prompt - 1] = torch.nan
        hidden[first + last - 1] = torch.nan
    _, _, losses, _ = step(batch, teacher=verl_cases.teacher_head)
    assert losses.isfinite().all()


def test_a_forward_without_a_teacher_gives_logprobs_alone():
    model = verl_cases.student()
    ids = torch.randint(verl_cases.VOCAB, (2, 5))
    output = verl.forward_with_topd(model, ids, temperature=0.8)
    expected = (model(ids).logits / 0.8).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:].unsqueeze(-1))[..., 0]
    assert_near(output.log_probs[:, :-1].detach(), expected.detach(), 1e-5)
    assert output.fused_linear_aux is None
    assert output.logits is None


def test_the_teachers_rows_are_of_no_type_that_fsdp_casts():
    """torch casts the tensors in tuples, lists, mappings and dataclasses that a forward gets."""
    batch = verl_cases.batch() | verl_cases.FLAGS
    rows = verl.rows_of(batch, None, topd.ReverseKL(), ulysses=False)
    half = torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    assert isinstance(rows, TeacherRows)
    assert half.cast_forward_inputs
    cast = torch.utils._pytree.tree_map(lambda leaf: "cast" if isinstance(leaf, torch.Tensor) else leaf, {"rows": rows})
    assert cast["rows"] is rows
    assert not hasattr(rows, "__dataclass_fields__")


def other_forward(self, input_ids=None, attention_mask=None, *, temperature=1.0, targets=None, **loss_kwargs):
    """Has a signature alone."""


def test_a_changed_signature_is_named(monkeypatch):
    for name, module in verl_stubs.modules("0.12.0", other_forward).items():
        monkeypatch.setitem(sys.modules, name, module)
    expected = r"knows the signatures of verl 0\.9 and 0\.10; verl 0\.12\.0 is .*forward_with_torch_backend.*targets"
    with pytest.raises(ImportError, match=expected):
        verl.register()


@pytest.mark.parametrize("method", sorted(verl.ENGINE_TAKES))
def test_an_engine_with_another_method_is_named(monkeypatch, method):
    monkeypatch.setattr(verl_stubs.FSDPEngineWithLMHead, method, lambda self, other: None)
    with pytest.raises(ImportError, match=rf"verl 0\.9\.1 is .*FSDPEngineWithLMHead.{method}\('self', 'other'\)"):
        verl.register()


def test_an_older_verl_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl.trainer.distillation.losses", None)
    with pytest.raises(ImportError, match=r"needs verl 0\.9 and 0\.10, 0\.9\.1 is installed"):
        verl.register()


def test_refusals():
    batch = verl_cases.batch() | verl_cases.FLAGS
    for flag in ("use_fused_kernels", "use_remove_padding"):
        with pytest.raises(ValueError, match=f"model.{flag} must be True"):
            step(batch | {flag: False}, teacher=verl_cases.teacher_head)
    with pytest.raises(ValueError, match=r"must have teacher_hidden, a nested tensor .* got none"):
        step({name: value for name, value in batch.items() if name != "teacher_hidden"}, teacher=verl_cases.teacher_head)
    with pytest.raises(ValueError, match=r"must have teacher_ids, a nested tensor .* got another tensor"):
        step(batch | {"teacher_ids": torch.ones(3, 11, 5)})
    with pytest.raises(ValueError, match='must be "forward_kl" or "reverse_kl" where teacher is None'):
        verl.register(divergence="jsd")
    with pytest.raises(TypeError, match="teacher must be a function"):
        verl.register(teacher=verl_cases.teacher_head())
    policy_gradient = verl_cases.distillation_config(use_policy_gradient=True)
    with pytest.raises(ValueError, match="use_policy_gradient must be False"):
        verl.response_losses(None, policy_gradient, {}, batch)
    with pytest.raises(ValueError, match="use_fused_kernels=True and use_remove_padding=True"):
        verl.response_losses(None, verl_cases.distillation_config(), {}, batch)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return start("integrations/verl_ranks.py", tmp_path_factory.mktemp("ranks"), timeout=120)


@pytest.mark.parametrize("wrapper", ["fsdp", "fsdp2"])
def test_a_student_that_is_sharded_gets_the_gradients_of_full_logits(ranks, wrapper):
    """Although no tensor of the model's usual output is used: FSDP hooks the losses that it finds in it."""
    true = verl_cases.truth(verl_cases.student(), "reverse_kl", topk=False)
    for rank in ranks:
        assert_near(rank[wrapper]["loss"], true["losses"].sum().double(), 1e-5)
        assert set(rank[wrapper]["grads"]) == set(true["grads"])
        for name, grad in true["grads"].items():
            assert_near(rank[wrapper]["grads"][name], grad, 1e-4, name)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """What the installed verl and topd returned on two ranks of FSDP2."""
    return start("integrations/real_verl.py", tmp_path_factory.mktemp("real"), timeout=240)


@pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")
@pytest.mark.parametrize("topk", [True, False])
def test_the_installed_verl_gets_the_losses_of_full_logits(real, topk):
    true = verl_cases.truth(verl_cases.student(), "reverse_kl", topk=topk)
    for rank in real:
        case = rank["topk" if topk else "hidden"]
        assert case["loss"] == pytest.approx(float(true["losses"].sum()) / sum(verl_cases.RESPONSES), rel=1e-5)
        assert {"distillation/mean_nats", "distillation/loss_min", "distillation/loss_max"} <= set(case["metrics"])
        for name, grad in true["grads"].items():
            assert_near(case["grads"][name] * sum(verl_cases.RESPONSES), grad, 1e-4, name)
        half = rank["topk, bfloat16" if topk else "hidden, bfloat16"]
        assert half["loss"] == pytest.approx(case["loss"], rel=0.05)
