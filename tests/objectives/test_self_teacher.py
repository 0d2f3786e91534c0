"""A model that teaches itself: which weights teach, that all of it comes back, and what is refused."""

import copy
from contextlib import nullcontext

import pytest
import torch
from self_teacher_cases import MILD, TARGETS, adapted, frozen, logits_of, modes, plain, step, teacher_logits
from tiny_models import checkpoint_activations, flat_gradient, tiny

from topd.models.adapters import adapters_off
from topd.objectives.self_teacher import self_teacher

peft = pytest.importorskip("peft")

STUDENTS = {"plain": plain, "LoRA": adapted, "LoRA not on the head": lambda: adapted(["q_proj", "down_proj"])}
KINDS = ("initial", "live", "ema")


def expected_teacher(kind, student, initial, average):
    """Return a dense teacher built anew from the weights that the kind means."""
    if kind == "initial":
        return initial
    dense = frozen(student)
    if kind == "ema":
        for name, parameter in dense.named_parameters():
            parameter.data = average.get(name, parameter.data)
    return dense


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", STUDENTS.values(), ids=STUDENTS)
def test_the_weights_that_teach(build, kind):
    student, decay = build(), 0.7
    initial, teacher = frozen(student), self_teacher(student, kind, decay)
    average = {name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad}
    for number in range(4):
        dense = expected_teacher(kind, student, initial, average)
        torch.testing.assert_close(teacher_logits(teacher), logits_of(dense), rtol=1e-12, atol=1e-12)
        assert number == 0 or not torch.allclose(logits_of(student), logits_of(initial), atol=1e-3)
        step(student, number)
        teacher.after_step()
        for name, parameter in student.named_parameters():
            if name in average:
                average[name] = decay * average[name] + (1 - decay) * parameter.detach()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_initial_teachers_logits_stay_bit_for_bit(dtype, checkpointed, autocast):
    """A LoRA in float32 over a base in bfloat16, as PEFT makes it; autocast would keep casts of weights between the passes."""
    student = adapted(base=tiny("llama", **MILD).to(dtype)).train()
    if checkpointed:
        checkpoint_activations(student.get_base_model())
    teacher = self_teacher(student, "initial", 0.5)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.5)
    logits = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            own = logits_of(student)
            logits.append(teacher_logits(teacher))
            loss = own.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not torch.equal(own, logits[0])
    assert all(torch.equal(each, logits[0]) for each in logits)


@pytest.mark.parametrize("order", ["teacher first", "student first"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [plain, adapted])
def test_the_students_gradient_is_as_without_a_teacher(build, kind, autocast, order):
    student = (build().float() if autocast else build()).train()
    teacher = self_teacher(student, kind, 0.7)
    step(student)
    teacher.after_step()
    alone = copy.deepcopy(student)

    def context():
        return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    with context():
        expected = logits_of(alone)
    expected.square().mean().backward()
    with context():
        taught = teacher_logits(teacher)
    with context():
        first = teacher_logits(teacher) if order == "teacher first" else None
        own = logits_of(student)
        assert torch.equal(teacher_logits(teacher) if first is None else first, taught)
    own.square().mean().backward()
    assert torch.equal(own, expected)
    assert torch.equal(flat_gradient(student), flat_gradient(alone))
    assert flat_gradient(student).abs().max() > 0
    assert torch.equal(taught, own) == (kind == "live")


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [plain, adapted])
def test_modes_weights_adapters_and_gradients_come_back(build, kind, error):
    student = build().train()
    student.get_input_embeddings().eval()
    teacher = self_teacher(student, kind, 0.7)
    step(student)
    teacher.after_step()
    before = [(p, p.requires_grad, p.data_ptr(), p.detach().clone(), p._version) for p in student.parameters()]
    training, logits = modes(student), logits_of(student)
    with pytest.raises(ZeroDivisionError) if error else nullcontext(), teacher.in_place():
        assert not any(modes(teacher.model))
        assert not torch.is_grad_enabled()
        assert not error or 1 / 0
    assert modes(student) == training
    for parameter, trained, place, value, version in before:
        assert (parameter.requires_grad, parameter.data_ptr(), parameter._version) == (trained, place, version)
        assert torch.equal(parameter, value)
    assert torch.equal(logits_of(student), logits)
    assert torch.is_autocast_cache_enabled()


def test_what_the_user_has_frozen_in_the_adapter_stays_frozen():
    """PEFT's own disable_adapter makes every tensor of the active adapter trainable when it ends."""
    student = adapted()
    for name, parameter in student.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    trained = [p.requires_grad for p in student.parameters()]
    with self_teacher(student, "initial", 0.5).in_place():
        pass
    assert [p.requires_grad for p in student.parameters()] == trained


def test_the_active_adapter_of_several_comes_back():
    student = adapted()
    student.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    student.set_adapter("second")
    base = logits_of(tiny("llama", **MILD).double())
    teacher = self_teacher(student, "initial", 0.5)
    step(student)
    torch.testing.assert_close(teacher_logits(teacher), base, rtol=1e-12, atol=1e-12)
    assert student.active_adapters == ["second"]
    assert not torch.allclose(logits_of(student), base, atol=1e-3)


def test_copies_of_whole_modules_are_off_too():
    student = adapted(["q_proj"], modules_to_save=["lm_head", "norm"])
    base, teacher = logits_of(tiny("llama", **MILD).double()), self_teacher(student, "initial", 0.5)
    assert teacher.model is student
    step(student)
    torch.testing.assert_close(teacher_logits(teacher), base, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(logits_of(student), base, atol=1e-3)


def test_a_lora_by_the_models_own_add_adapter_and_on_the_embeddings():
    base = tiny("llama", **MILD).double()
    logits = logits_of(base)
    base.add_adapter(peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"]))
    teacher = self_teacher(base, "initial", 0.5)
    assert teacher.model is base
    step(base)
    torch.testing.assert_close(teacher_logits(teacher), logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "build",
    [
        lambda: adapted(["q_proj"], base=plain(attention_bias=True), bias="all"),
        lambda: adapted(["q_proj"], use_dora=True),
        lambda: adapted(["q_proj"], trainable_token_indices={"embed_tokens": [3, 4]}),
        lambda: peft.get_peft_model(
            plain(attention_bias=True), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        ),
        lambda: peft.get_peft_model(plain(), peft.LoHaConfig(r=2, target_modules=["k_proj"])),
    ],
    ids=["biases", "DoRA", "tokens", "IA3", "LoHa"],
)
def test_where_switching_off_is_not_the_beginning_a_copy_teaches(build):
    student = build()
    initial, teacher = logits_of(student).detach(), self_teacher(student, "initial", 0.5)
    assert teacher.model is not student
    step(student)
    assert torch.equal(teacher_logits(teacher), initial)
    assert not torch.allclose(logits_of(student), initial, atol=1e-3)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())


def test_a_lora_that_is_not_zero_is_refused():
    for name in ("layers.1.self_attn.v_proj", "lm_head"):
        student = adapted()
        layer = student.get_base_model().get_submodule(name if name == "lm_head" else f"model.{name}")
        layer.lora_B["default"].weight.data[0, 0] = 1e-30
        place = rf"\S*{name}\.lora_B\.default"
        with pytest.raises(ValueError, match=rf"not zero, {place}; merge it first .* fresh adapter"):
            self_teacher(student, "initial", 0.5)
    assert self_teacher(student, "live", 0.5)
    assert self_teacher(student, "ema", 0.5)
    assert self_teacher(
        peft.get_peft_model(student.merge_and_unload(), peft.LoraConfig(target_modules=TARGETS)), "initial", 0.5
    )


def test_a_changed_copy_of_a_module_and_merged_adapters_are_refused():
    student = adapted(["q_proj"], modules_to_save=["norm"])
    student.get_base_model().model.norm.modules_to_save["default"].weight.data[3] += 1
    with pytest.raises(ValueError, match=r"not zero, \S*norm\.modules_to_save\.default\.weight; merge it first"):
        self_teacher(student, "initial", 0.5)
    merged = adapted()
    teacher = self_teacher(merged, "initial", 0.5)
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"got merged ones in \S*q_proj; call unmerge_adapter\(\) first"), teacher.in_place():
        pass
    with pytest.raises(ValueError, match=r"not zero, merged adapters in \S*q_proj"):
        self_teacher(merged, "initial", 0.5)
    merged.unmerge_adapter()
    with adapters_off(merged):
        pass


def test_what_is_trained_may_not_change_under_the_teacher():
    student = adapted()
    initial, average = (self_teacher(student, kind, 0.5) for kind in ("initial", "ema"))
    student.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"train its adapters alone .* got \S*model.norm.weight"), initial.in_place():
        pass
    for call in (average.after_step, lambda: teacher_logits(average)):
        with pytest.raises(ValueError, match=r"got \S*model.norm.weight changed"):
            call()


@pytest.mark.parametrize("kind", ["initial", "ema"])
def test_weights_that_are_elsewhere_are_refused(kind):
    student = plain()
    student.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"got model\.norm\.weight sharded or offloaded"):
        self_teacher(student, kind, 0.5)


def test_a_16_bit_students_average_is_held_in_float32():
    """In bfloat16 0.001 of a step would round away: the average would never move."""
    student = tiny("llama", **MILD).bfloat16()
    teacher = self_teacher(student, "ema", 0.999)
    before = teacher.state_dict()
    assert {each.dtype for each in before.values()} == {torch.float32}
    step(student, size=0.05)
    teacher.after_step()
    for name, value in teacher.state_dict().items():
        expected = 0.999 * before[name].double() + 0.001 * student.get_parameter(name).double()
        torch.testing.assert_close(value.double(), expected, rtol=3e-7, atol=1e-9)
    assert all((teacher.state_dict()[name] != before[name]).any() for name in before)


def test_nothing_depends_on_inference_mode():
    student = plain()
    with torch.inference_mode():
        teacher = self_teacher(student, "ema", 0.5)
        teacher_logits(teacher)
        teacher.after_step()
    step(student)
    teacher.after_step()
    assert not any(each.requires_grad or each.is_inference() for each in teacher.state_dict().values())
    logits_of(student).sum().backward()
    assert flat_gradient(student).abs().max() > 0


def test_states_of_checkpoints():
    student, other = plain(), plain()
    teacher, resumed = (self_teacher(each, "ema", 0.5) for each in (student, other))
    step(student)
    teacher.after_step()
    resumed.load_state_dict(teacher.state_dict())
    torch.testing.assert_close(teacher_logits(resumed), teacher_logits(teacher), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"got one without 'initial'"):
        self_teacher(other, "initial", 0.5).load_state_dict(teacher.state_dict())
    with pytest.raises(ValueError, match=r"got one with 'initial'"):
        self_teacher(other, "live", 0.5).load_state_dict(self_teacher(other, "initial", 0.5).state_dict())
    with pytest.raises(ValueError, match=r"state must hold lm_head.weight of shape \[61, 32\], got \[3\]"):
        resumed.load_state_dict(teacher.state_dict() | {"lm_head.weight": torch.ones(3)})
    with pytest.raises(TypeError, match="state must be a mapping of tensors, got int"):
        resumed.load_state_dict(3)


@pytest.mark.parametrize("build", [plain, adapted])
def test_a_run_that_began_at_other_weights_is_refused(build):
    """Else a student built from a checkpoint of the middle of a run would be its own initial teacher without a word."""
    state = self_teacher(build(), "initial", 0.5).state_dict()
    assert set(state) == {"initial"}
    self_teacher(build(), "initial", 0.5).load_state_dict(state)
    middle = build()
    middle.get_submodule("model.norm" if build is plain else "base_model.model.model.norm").weight.data[5] *= 1.01
    with pytest.raises(ValueError, match=r"must hold the weights with which the run began .* build it from its original"):
        self_teacher(middle, "initial", 0.5).load_state_dict(state)
