"""What an objective says of its models once: compiled in a place that it does not run, a teacher with dropout."""

import warnings

import pytest
import torch
from compare import assert_near
from objective_cases import MILD, backward, batch_of, models
from tiny_models import tiny
from torch._dynamo.testing import CompileCounter

import topd
from topd.integrations.rollouts import pack_rollouts
from topd.objectives.model_checks import ModelChecks

METHODS = pytest.mark.parametrize("method", [topd.OPD, topd.TOPD])


def warnings_of(objective, batch=None, calls=2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            objective(batch or batch_of())
    here = [(each.category, str(each.message)) for each in caught if each.filename == __file__]
    return [(category, message) for category, message in here if not message.startswith("gate")]  # TOPD's, of few candidates


@METHODS
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("way", ["torch.compile", "model.compile"])
def test_a_compiled_whole_is_warned_of_once(method, side, way):
    """And is not run."""
    pair, counter = dict(zip(("student", "teacher"), models(), strict=True)), CompileCounter()
    if way == "torch.compile":
        pair[side] = torch.compile(pair[side], backend=counter)
    else:
        pair[side].compile(backend=counter)
    ((category, message),) = warnings_of(method(**pair))
    assert category is UserWarning
    assert message.startswith(f"{side} is compiled as a whole, but topd runs its base model and its output layer apart")
    assert "model.base_model.compile()" in message
    assert counter.frame_count == 0


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("way", ["base_model.compile", "torch.compile(base)", "layers"])
def test_a_compiled_base_model_runs_compiled_and_right(way, form):
    torch._dynamo.reset()
    student, teacher = models()
    batch, counter = batch_of(), CompileCounter()
    batch = pack_rollouts(batch) if form == "packed" else batch
    expected = topd.OPD(student, teacher)(batch)
    gradient = backward(student, expected.loss)
    if way == "base_model.compile":
        student.base_model.compile(backend=counter)
    elif way == "layers":
        for layer in student.model.layers:
            layer.compile(backend=counter)
    else:
        student.model = torch.compile(student.model, backend=counter)
    objective = topd.OPD(student, teacher)
    assert not warnings_of(objective, batch)
    result = objective(batch)
    assert counter.frame_count > 0
    assert_near(result.loss.detach(), expected.loss.detach().double(), 1e-5)
    assert_near(backward(student, result.loss), gradient.double(), 1e-5)


def test_a_compiled_whole_with_a_compiled_base_model_is_as_asked():
    student, teacher = models()
    student.model.compile(backend=CompileCounter())
    assert not warnings_of(topd.OPD(torch.compile(student, backend="eager"), teacher))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torch.compile(base)", "base_model.compile"])
def test_windows_of_a_compiled_base_model_branch_and_see_masks_and_positions(way):
    student, teacher = models()
    config = topd.TOPDConfig(candidates="top_k", candidate_value=2, horizon=4, window_temperature=0.0)
    expected = topd.TOPD(student, teacher, config)(batch_of())
    if way == "base_model.compile":
        student.model.compile(backend="eager")
    else:
        student.model = torch.compile(student.model, backend="eager")
    objective = topd.TOPD(student, teacher, config)(batch_of())
    windows = objective.near_future.windows
    assert windows.student_way == "branches"
    assert torch.equal(windows.student_tokens, expected.near_future.windows.student_tokens)
    assert_near(objective.loss.detach(), expected.loss.detach().double(), 1e-5)


@METHODS
@pytest.mark.parametrize("where", ["attention", "module"])
def test_a_teacher_with_dropout_is_warned_of_once(method, where):
    student, teacher = models()[0], tiny("qwen3", seed=3, attention_dropout=0.1 if where == "attention" else 0.0, **MILD)
    if where == "module":
        teacher.model.layers[1].mlp.act_fn = torch.nn.Sequential(
            teacher.model.layers[1].mlp.act_fn, torch.nn.Dropout(0.2)
        ).eval()
    assert not warnings_of(method(student, teacher))
    teacher.train()
    ((category, message),) = warnings_of(method(student, teacher))
    assert category is UserWarning
    assert message.startswith("teacher is in train mode with dropout")
    assert "call teacher.eval()" in message


@pytest.mark.parametrize("wanted", [True, False])
def test_a_router_loss_that_is_left_out_is_warned_of_once(wanted):
    """transformers adds it in the forward of the whole model; the loss here is the divergence alone."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": wanted}
    student, teacher = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **options)), models()[1]
    warned = warnings_of(topd.OPD(student, teacher))
    assert [category for category, _ in warned] == [UserWarning] * wanted
    for _, message in warned:
        assert message.startswith("student.config.output_router_logits is True")
        assert "the loss here is without it" in message


def test_without_a_teacher_the_student_alone_is_looked_at():
    student = tiny("llama", attention_dropout=0.1, **MILD).train()
    student.compile(backend="eager")
    checks = ModelChecks(student, None, False)
    with pytest.warns(UserWarning, match="student is compiled as a whole") as caught:
        checks.before_step(student, None)
    assert len(caught) == 1


def test_a_teacher_in_train_mode_without_dropout_and_a_student_with_it_are_fine():
    student, teacher = tiny("llama", attention_dropout=0.1, **MILD).train(), models()[1].train()
    assert not warnings_of(topd.OPD(student, teacher))


@pytest.mark.parametrize(
    ("method", "config", "other"),
    [(topd.OPD, topd.TOPDConfig(), "TOPD"), (topd.TOPD, topd.OPDConfig(), "OPD")],
)
def test_the_configuration_of_another_method_is_refused(method, config, other):
    message = rf"config must be a topd\.{method.__name__}Config, got {other}Config; topd\.{other} takes that one"
    with pytest.raises(TypeError, match=message):
        method(*models(), config)
