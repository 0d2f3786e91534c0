"""Examples that are run as a user runs them: a command, and what it prints and leaves behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]


def printed_losses(name: str, *arguments: str) -> list[float]:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python_api")}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return [float(found) for found in re.findall(r"([\d.]+) nats$", output, re.MULTILINE)]


def test_a_student_learns_from_the_offline_teachers_file_alone(tmp_path):
    """The folder is the user's: the whole file stays there, under its name and no other."""
    losses = printed_losses("offline_teacher.py", str(tmp_path))
    assert len(losses) >= 5
    assert losses[-1] < 0.1 * losses[0]
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]
    data = load_file(tmp_path / "teacher.safetensors")
    assert data["teacher_logprobs"].shape == data["teacher_ids"].shape
    assert data["teacher_ids"].shape[:-1] == data["input_ids"].shape
