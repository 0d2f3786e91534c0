"""What the README and the examples print is what runs."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def snippets():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(snippet):
    """The names that it leaves behind."""
    names: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    return names


def test_the_readmes_example_runs_as_printed(capsys):
    names = run(snippets()[0])
    assert names["per_token"].shape == (2, 64)
    assert (names["per_token"][:, :16] == 0).all()
    assert (names["per_token"][:, 16:] > 0).all()
    assert torch.isfinite(names["student"].weight.grad).all()
    assert "nats per token" in capsys.readouterr().out


def test_the_first_example_divides_safely_where_no_token_counts():
    names = run(snippets()[0].replace(">= 16", ">= 64"))
    assert names["mask"].sum() == 0
    assert names["loss"] == 0
    for grad in (names["student"].weight.grad, names["student_hidden"].grad):
        assert (grad == 0).all()


def test_the_example_with_models_pairs_states_and_tokens():
    """Its loss is the mean reverse KL of both models' own distributions of the response tokens."""
    pytest.importorskip("transformers")
    assert len(snippets()) == 2
    names = run(snippets()[1])
    assert names["mask"].sum() == names["response_mask"].sum() == 2 * 48
    with torch.no_grad():
        logprobs = [names[side](names["input_ids"]).logits.log_softmax(-1) for side in ("student_model", "teacher_model")]
    student, teacher = (each[:, 15:-1] for each in logprobs)
    expected = (student.exp() * (student - teacher)).sum(-1).mean()
    torch.testing.assert_close(names["loss"].detach(), expected, atol=1e-6, rtol=1e-5)
    grads = [parameter.grad for parameter in names["student_model"].parameters()]
    assert all(grad is not None and grad.ne(0).any() for grad in grads)
    assert all(parameter.grad is None for parameter in names["teacher_model"].parameters())


def test_the_first_example_distils(capsys):
    runpy.run_path(str(ROOT / "examples" / "first_loss.py"), run_name="__main__")
    losses = [float(loss) for loss in re.findall(r"reverse KL +([\d.]+) nats", capsys.readouterr().out)]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]


def test_every_divergence_of_the_table_exists():
    import topd
    from topd.divergences import BY_NAME

    rows = re.findall(r"^\| `\"(\w+)\"` \| `(\w+)\(", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == set(BY_NAME)
    for name, made_by in rows:
        assert getattr(topd, made_by)().name == name
