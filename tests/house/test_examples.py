"""Examples that are run as a user runs them: a command, and what it prints and leaves behind."""

import math
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import smollm2_cases
import torch
from safetensors.torch import load_file

from topd_demo import smollm2

ROOT = Path(__file__).parents[2]


def printed_losses(name: str, *arguments: str) -> list[float]:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python_api")}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return [float(nats) for nats in re.findall(r"([\d.]+) nats$", output, re.MULTILINE)]


def test_a_student_learns_from_the_offline_teachers_file_alone(tmp_path):
    """The folder is the user's: the whole file stays there, under its name and no other."""
    losses = printed_losses("offline_teacher.py", str(tmp_path))
    assert len(losses) >= 5
    assert losses[-1] < 0.1 * losses[0]
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]
    data = load_file(tmp_path / "teacher.safetensors")
    assert data["teacher_logprobs"].shape == data["teacher_ids"].shape
    assert data["teacher_ids"].shape[:-1] == data["input_ids"].shape


@pytest.fixture(scope="module")
def teacher() -> torch.nn.Module:
    if reason := smollm2.missing():
        pytest.skip(reason)
    return smollm2_cases.model()


@pytest.fixture(scope="module")
def pair(teacher) -> Iterator[list[str]]:
    """The two models that a script is given by name: folders with SmolLM2-135M and with six of its layers."""
    tokenizer = smollm2_cases.tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("teacher", teacher), ("student", smollm2.sliced(teacher))):
            model.save_pretrained(Path(folder, name))
            tokenizer.save_pretrained(Path(folder, name))
        yield [f"{folder}/teacher", f"{folder}/student"]


@pytest.fixture
def lines(monkeypatch, capsys, teacher, pair):
    """What a script prints; here and not as a command, so that libraries are imported once for all of them."""

    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *pair, *arguments])
        names = runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        assert all(map(torch.equal, names["teacher"].parameters(), teacher.parameters())), "the teacher changed"
        return capsys.readouterr().out.splitlines()

    return run


def test_a_loop_is_profiled(tmp_path, lines):
    pytest.importorskip("matplotlib")
    output = lines("profile_loop.py", str(tmp_path))
    assert output[0].startswith("profile of OPD on cpu")
    stages = {line.split("  ")[0] for line in output}
    assert {"rollouts, sampled", "teacher's forward", "student's forward", "divergence", "student's backward"} <= stages
    assert {path.name for path in tmp_path.iterdir()} == {"profile.json", "profile.png"}


def test_from_a_prompt_to_the_loss_in_under_sixty_lines(tmp_path, lines):
    pytest.importorskip("matplotlib")
    assert len((ROOT / "examples" / "topd_step.py").read_text().splitlines()) < 60
    output = "\n".join(lines("topd_step.py", str(tmp_path)))
    metrics = dict(re.findall(r"^(\w+) +(-?[\d.]+)$", output, re.MULTILINE))
    assert float(metrics["loss"]) > float(metrics["opd_loss"]) > 0
    assert metrics["student_branches"] == metrics["teacher_branches"] == "1.000"
    assert {path.name for path in tmp_path.iterdir()} == {"distances.png", "windows.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_use_the_public_api_alone(script):
    """A reader copies them into a project that has topd and the hosts, and nothing else."""
    integrations = {f"topd.integrations.{name}" for name in ("rollouts", "refine_rollout", "transformers", "trl")}
    public = {"topd", "topd.plots", *integrations}
    if script.name == "smollm2_pair.py":  # which has the models of the demo
        public |= {"topd_demo", "topd_demo.influence"}
    used = re.findall(r"^(?:from|import) (topd\S*)", script.read_text(), re.MULTILINE)
    assert set(used) <= public
    assert used


def nats(lines: list[str]) -> list[float]:
    return [float(match[1]) for line in lines if (match := re.search(r"([\d.]+) nats$", line))]


@pytest.mark.slow
def test_torchs_loop_and_accelerates_take_the_same_steps(lines):
    pytest.importorskip("accelerate")
    losses = nats(lines("torch_loop.py", "2"))
    assert 0 < losses[1] < losses[0]
    assert nats(lines("accelerate_loop.py", "2")) == pytest.approx(losses, rel=1e-3)


def test_transformers_trainer(lines):
    pytest.importorskip("accelerate")
    evaluation, *steps = nats(lines("transformers_trainer.py", "2"))
    assert 0 < steps[1] < steps[0]
    assert 0 < evaluation < steps[0]


@pytest.mark.slow
def test_a_pair_without_a_hub(teacher, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(sys, "argv", ["smollm2_pair.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "smollm2_pair.py"), run_name="__main__")
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "135 million weights",
        "113 million weights",
    ]
    saved, student = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("teacher", "student"))
    assert torch.equal(saved.lm_head.weight, teacher.lm_head.weight)
    assert len(student.model.layers) == len(saved.model.layers) - 6
    assert AutoTokenizer.from_pretrained(tmp_path / "student").chat_template


def test_trl_trainer(lines):
    pytest.importorskip("trl")
    (line,) = (line for line in lines("trl_trainer.py", "1") if line.startswith("step 1"))
    opd, loss = map(float, re.findall(r"[\d.]+", line)[1:])
    assert loss == pytest.approx(opd, abs=2e-3)
    (line,) = (line for line in lines("trl_trainer.py", "1", "topd") if line.startswith("step 1"))
    opd, guidance, candidates, loss = map(float, re.findall(r"[\d.]+", line)[1:])
    assert loss == pytest.approx(opd + 0.1 * guidance, abs=2e-3)
    assert guidance > 0
    assert candidates == 2


@pytest.mark.slow
def test_peft_lora(lines):
    pytest.importorskip("peft")
    printed = lines("peft_lora.py", "2")
    first, second = nats(printed)
    assert 0 < second < first
    assert printed[-1] == "base weights unchanged: True"


def test_packed_rollouts(lines):
    padded, packed = (line.split(", ") for line in lines("packed_rollouts.py"))
    assert padded[-1] == packed[-1]
    assert padded[-2] == packed[-2]


@pytest.mark.slow
def test_context_distillation(monkeypatch, capsys, pair):
    monkeypatch.setattr(sys, "argv", ["context_distillation.py", pair[0], "2"])
    names = runpy.run_path(str(ROOT / "examples" / "context_distillation.py"), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["before"] * 2 + ["step 0", "step 1"] + ["after"] * 2
    assert all(loss > 0 for loss in nats(printed))
    changed = zip(names["model"].parameters(), names["objective"].teacher.parameters(), strict=True)
    assert not any(torch.equal(*both) for both in changed)


@pytest.mark.slow
def test_online_trd(lines):
    pytest.importorskip("accelerate")
    printed = lines("online_trd.py", "1")
    (loss,) = nats(printed)
    assert loss > 0
    counts = re.findall(r"'(\w+)': (\d+)", printed[-1])
    assert sum(int(count) for kind, count in counts if kind != "cut") == 4


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


PROBLEMS = [{"id": str(number), "problem": f"What is {number} + 1?", "reference": str(number + 1)} for number in range(2)]


def test_the_opsd_page_runs_as_printed(tmp_path, monkeypatch):
    from tiny_models import tiny
    from trainer_cases import prompts
    from trd_cases import TOKENIZER

    from topd.trd import generate

    monkeypatch.chdir(tmp_path)
    generate(PROBLEMS, lambda request: "It is 2.", "rollouts.jsonl", "rollout")
    loop, data = blocks_of("opsd.md")
    model = tiny("llama")
    longer = {name: torch.cat([value, value], 1) for name, value in prompts().items()}
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "prompts": prompts()}
    names["longer_prompts"] = {**longer, "attention_mask": longer["attention_mask"].cummax(-1).values}
    exec(compile(loop, "opsd.md", "exec"), names)
    assert names["result"].loss > 0
    assert names["result"].scores.forward_kl.shape == names["rollouts"]["input_ids"].shape
    names |= {"student": tiny("llama", vocab_size=260, max_position_embeddings=2048), "tokenizer": TOKENIZER}
    exec(compile(data, "opsd.md", "exec"), names)
    assert all(torch.isfinite(parameter.grad).all() for parameter in names["student"].parameters())


def test_the_trd_page_runs_as_printed(tmp_path, monkeypatch):
    """But for the block that asks two servers."""
    pytest.importorskip("accelerate")
    from tiny_models import tiny
    from trainer_cases import arguments
    from trd_cases import TOKENIZER

    from topd.trd import batches, generate

    monkeypatch.chdir(tmp_path)
    generate(PROBLEMS, lambda request: "It is 3.", "rollouts.jsonl", "rollout")
    generate("rollouts.jsonl", lambda request: "It is 2.", "refined.jsonl", "refine")
    server, loss, online = blocks_of("trd.md")
    assert "FromServer" in server
    sizes = {"vocab_size": 260, "max_position_embeddings": 2048}
    names = {"student_model": tiny("llama", **sizes), "teacher_model": tiny("qwen3", seed=3, **sizes)}
    names |= {"tokenizer": TOKENIZER, "batches": batches, "arguments": arguments(tmp_path), "dataset": PROBLEMS}
    exec(compile(loss, "trd.md", "exec"), names)
    assert names["result"].loss > 0

    def collator(rows):
        texts = [row["problem"] for row in rows]
        return {**TOKENIZER(texts, padding=True, padding_side="left", return_tensors="pt"), "problem": texts}

    exec(compile(online, "trd.md", "exec"), names | {"collator": collator})


def test_the_trainers_page_runs_as_printed(tmp_path):
    """But for TRL's block, which wants a tokenizer: its script is tested above."""
    pytest.importorskip("accelerate")
    from tiny_models import tiny
    from trainer_cases import arguments, prompts, rows_of

    import topd

    blocks = blocks_of("trainers.md")
    names: dict[str, object] = {"topd": topd, "torch": torch, "student": tiny("llama"), "teacher": tiny("qwen3", seed=3)}
    names |= {"prompts": prompts(), "left_padded": None}
    names |= {"arguments": arguments(tmp_path), "dataset": rows_of(prompts())}
    run = [block for block in blocks if "integrations.trl" not in block]
    assert len(run) == len(blocks) - 1 == 2
    for block in run:
        exec(compile(block, "trainers.md", "exec"), names)
    assert names["loss"] > 0
    assert names["trainer"].state.global_step == 1


def test_the_topd_page_runs_as_printed():
    from objective_cases import batch_of, models

    text = (ROOT / "docs" / "topd.md").read_text()
    whole, server, _, elsewhere, matched = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    student, teacher = models()
    batch = batch_of()
    names: dict[str, object] = {"student": student, "teacher": teacher, "batch": batch}
    exec(compile(whole, "topd.md", "exec"), names)
    assert names["result"].near_future.windows.teacher_tokens.shape[1] == 50
    assert any(parameter.grad is not None and (parameter.grad != 0).any() for parameter in student.parameters())
    assert torch.isfinite(names["result"].loss)
    names["answers"] = [[{3: -0.5, 7: -1.5}] * int(count) for count in batch["attention_mask"].sum(-1)]
    exec(compile(server, "topd.md", "exec"), names)
    assert names["step"].metrics["teacher_topk_mass"] == pytest.approx(math.exp(-0.5) + math.exp(-1.5))
    names |= {
        "positions": names["result"].near_future.windows.positions[:2],
        "student_ids": [[3, 4, 5], [6]],
        "teacher_ids": [[3, 4], [7, 8, 9]],
    }
    exec(compile(elsewhere, "topd.md", "exec"), names)
    assert names["result"].near_future.windows.teacher_lengths.tolist() == [2, 3]
    names["batch"] = {key: torch.cat([value, value]) for key, value in batch.items()}  # enough candidates for a false alarm
    exec(compile(matched, "topd.md", "exec"), names)
    near, capped, weights = names["near"], names["capped"], names["matched"]
    alarms = int((~near.divergent).sum())
    assert alarms > 0
    assert torch.equal(weights[weights < 1].sort().values, capped[capped < 1].sort().values)
    row, column = near.windows.positions[near.transport.distance.argsort(descending=True)[:alarms]].unbind(-1)
    assert ((weights < 1).nonzero().tolist()) == sorted(torch.stack([row, column], -1)[weights[row, column] < 1].tolist())
    assert torch.isfinite(names["loss"])
