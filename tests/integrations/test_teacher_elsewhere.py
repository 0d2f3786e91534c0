"""A teacher in a process of its own: it dies while it answers, the student stops, and goes on when it is back. And which of a
server's states are the right ones."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from compare import assert_near
from cut_off import cut_off
from tiny_models import VOCAB, tiny

import topd

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "examples" / "teacher_over_loopback.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "python_api")}


@contextmanager
def teacher(port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run the teacher's process; give the port on which it answers."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "teacher", str(port)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline().rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


def student(folder: Path, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "student", str(folder), url]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=120)


def losses(output: str) -> dict[int, str]:
    """Return the printed loss of each step."""
    return {int(step): nats for step, nats in re.findall(r"^step +(\d+) .* ([\d.]+) nats$", output, re.MULTILINE)}


def test_a_teacher_that_dies_while_it_answers(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    with teacher() as (process, port):
        undisturbed = student(whole, f"http://127.0.0.1:{port}")
        assert undisturbed.returncode == 0, undisturbed.stderr
        with cut_off(port, answers=6, passed=200_000, kill=process.kill) as way:  # the output layer, and five steps
            stopped = student(cut, way.url)
        assert 200_000 < way.ever_sent < 16 * 64 * 4_096 * 2, "the teacher died in the middle of its answer"
        assert process.wait(timeout=10) == -9

    true = losses(undisturbed.stdout)
    assert list(true) == list(range(12))
    assert float(true[11]) < 0.8 * float(true[0])

    assert stopped.returncode == 1
    assert losses(stopped.stdout) == {step: true[step] for step in range(5)}
    assert f"the teacher did not answer request 5, of 16 x 64 tokens, at {way.url}/states: " in stopped.stderr
    assert f"start the teacher again, then run: python {SCRIPT} student {cut} {way.url}" in stopped.stderr
    assert "Traceback" not in stopped.stderr

    absent = student(cut, way.url)  # the teacher is not back yet
    assert absent.returncode == 1
    assert "did not answer the request for its output layer" in absent.stderr
    assert torch.load(cut / "student.pt")["step"] == 5
    assert [path.name for path in cut.iterdir()] == ["student.pt"]

    with teacher() as (_, port):
        resumed = student(cut, f"http://127.0.0.1:{port}")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.startswith("goes on at step 5 of ")
    assert losses(resumed.stdout) == {step: true[step] for step in range(5, 12)}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_sliding"])
def test_states_from_before_the_final_norm_need_it(kind):
    """What vLLM's last layer gives is not what the output layer multiplies: without the norm the loss is another, with it the
    model's own. Nothing raises, since both have one shape."""
    student, teacher = tiny(kind), tiny(kind, seed=3)
    ids = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(2))
    before = []
    hook = teacher.model.norm.register_forward_pre_hook(lambda _norm, inputs: before.append(inputs[0]))
    with torch.no_grad():
        logits = [model(ids).logits.double().log_softmax(-1) for model in (student, teacher)]
        hook.remove()
        own, head = topd.hidden_states(student, ids)
        other = topd.Head.from_model(teacher).detach()
        raw = topd.linear_divergence(own, head, before[0], other)
        normed = topd.linear_divergence(own, head, teacher.model.norm(before[0]), other)
    true = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
    assert_near(normed, true, 1e-5)
    assert raw.shape == true.shape
    assert ((raw - true).abs() > 0.1 * true).double().mean() > 0.5
