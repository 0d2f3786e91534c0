"""What the README and the examples print is what runs."""

import re
import runpy
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def test_the_readmes_example_runs_as_printed(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["per_token"].shape == (2, 64)
    assert (names["per_token"][:, :16] == 0).all()
    assert (names["per_token"][:, 16:] > 0).all()
    assert torch.isfinite(names["student"].weight.grad).all()
    assert "nats per token" in capsys.readouterr().out


def test_the_first_example_distils(capsys):
    runpy.run_path(str(ROOT / "examples" / "first_loss.py"), run_name="__main__")
    losses = [float(found) for found in re.findall(r"reverse KL +([\d.]+) nats", capsys.readouterr().out)]
    assert len(losses) == 12
    assert losses[-1] < 0.7 * losses[0]


def test_every_divergence_of_the_table_exists():
    import topd

    rows = re.findall(r"^\| `\"(\w+)\"` \| `(\w+)\(", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    for name, made_by in rows:
        assert getattr(topd, made_by)().name == name
