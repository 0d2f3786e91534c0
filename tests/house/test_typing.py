"""What a user's type checker sees: the README's snippets pass mypy --strict, a misspelt option does not."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import topd
from topd import divergences, options
from topd.backends import NAMES
from topd.branching import windows
from topd.losses import sampled, topk_divergence
from topd.near_future import candidates, false_alarms, gate
from topd.near_future.transport import SOLVERS
from topd.objectives import config
from topd.ops.transport import spec as transport

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[2]
# torch and transformers leave functions such as Tensor.backward untyped.
OPTIONS = ("--strict", "--untyped-calls-exclude=torch", "--untyped-calls-exclude=transformers", "--follow-imports=silent")
# What no signature of topd goes through: reading these modules takes eight times as long as all the rest.
UNREAD = ("_dynamo", "_inductor", "fx", "distributed", "ao", "onnx", "export", "_export", "_functorch", "utils._sympy")
UNREAD += ("_subclasses", "_prims", "_refs", "_decomp")
SKIPPED = ",".join(["transformers.*", "sympy.*", "numpy.*", *(f"torch.{name}.*" for name in UNREAD)])
CALLS = """\
import torch
import topd

hidden, head = torch.zeros(1, 2), topd.Head(torch.zeros(3, 2))
ids, flag = torch.zeros(1, 1, dtype=torch.int64), bool(hidden.numel())
sides = (hidden, head, hidden, head)

value: torch.Tensor = topd.linear_divergence(hidden, head, hidden, head, divergence="jsd", backend="eager")
pair: tuple[torch.Tensor, topd.TokenScores] = topd.linear_divergence(hidden, head, hidden, head, return_scores=True)
either: torch.Tensor | tuple[torch.Tensor, topd.TokenScores] = topd.linear_divergence(*sides, return_scores=flag)
logprobs: torch.Tensor = topd.linear_logprobs(hidden, head, ids)
both: tuple[torch.Tensor, torch.Tensor] = topd.linear_logprobs(hidden, head, ids, return_entropy=True)
wrong: torch.Tensor = topd.linear_divergence(hidden, head, hidden, head, return_scores=True)  # refused
missing: tuple[torch.Tensor, torch.Tensor] = topd.linear_logprobs(hidden, head, ids)  # refused
topd.linear_divergence(hidden, head, hidden, head, divergence="reverse_lk")  # refused
topd.linear_divergence(hidden, head, hidden, head, backend="cuda")  # refused
topd.linear_logprobs(hidden, head, ids, backend="cuda")  # refused
topd.entropy_aware_opd(hidden, head, hidden, head, backend="cuda")  # refused
topd.soft_target_kl(hidden, head, ids, ids.float(), backend="cuda")  # refused
topd.topk_divergence(hidden, head, ids, ids.float(), direction="backward")  # refused
topd.topk_divergence(hidden, head, ids, ids.float(), support="renormalized")  # refused
topd.sampled_kl(hidden, hidden, estimator="k4")  # refused
topd.near_future_divergence(ids, ids, hidden, cost="cosinus")  # refused
topd.near_future_divergence(ids, ids, hidden, solver="sinkhorm")  # refused
topd.guidance_kl(hidden, head, ids, hidden, backend="cuda")  # refused
topd.select_candidates(hidden, rule="top_p", value=0.1)  # refused
topd.divergent(hidden, rule="mean_plus_sd")  # refused
topd.false_alarm_weights(hidden, ids, ids, mode="drop")  # refused
topd.sample_windows(None, None, ids, ids, ids, student_window="rollouts")  # refused
topd.OPDConfig(divergence="kl")  # refused
topd.OPDConfig(reduction="mean")  # refused
topd.TOPDConfig(score="nll")  # refused
topd.TOPDConfig(candidates="top")  # refused
topd.TOPDConfig(student_window="new")  # refused
topd.TOPDConfig(cost="l2")  # refused
topd.TOPDConfig(embedding="hidden")  # refused
topd.TOPDConfig(solver="emd")  # refused
topd.TOPDConfig(gate="lowest")  # refused
topd.TOPDConfig(false_alarms="drop")  # refused
topd.OPSDConfig(teacher="frozen")  # refused
topd.OPDConfig(divergence=topd.JSD(0.3), reduction="sequence", position_clip=0.1)
batch: dict[str, torch.Tensor] = topd.pair([[1]], [[2, 3]], [[4]], pad_token_id=0)
topd.TOPDConfig(embedding=hidden, gate="threshold", gate_value=0.2)
topd.sampled_kl(hidden, hidden, estimator="k3")
"""


@pytest.fixture(scope="module", params=[SKIPPED, pytest.param("nothing", marks=pytest.mark.slow)], ids=["quick", "whole"])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """Return what mypy says of each file, by line: the README's snippets and CALLS, in one run."""
    folder = tmp_path_factory.mktemp("user")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (folder / "snippets.py").write_text("".join(snippets))  # each goes on with the names of those before
    (folder / "calls.py").write_text(CALLS)
    settings = tmp_path_factory.mktemp("settings") / "mypy.ini"
    settings.write_text(f"[mypy]\n[mypy-{request.param}]\nfollow_imports = skip\n")
    cache = getattr(request.config, "cache", None)  # None under -p no:cacheprovider
    kept = cache.mkdir("mypy") if cache else folder / "cache"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *OPTIONS, f"--config-file={settings}", f"--cache-dir={kept}", "."],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"MYPYPATH": str(Path(topd.__file__).parents[1])},
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors: dict[str, dict[int, str]] = {path.name: {} for path in sorted(folder.glob("*.py"))}
    for name, line, message in re.findall(r"^(\w+\.py):(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        errors[name][int(line)] = message
    return errors


def test_the_readmes_snippets_pass_strictly(reports: dict[str, dict[int, str]]) -> None:
    assert set(reports) == {"calls.py", "snippets.py"}
    assert reports["snippets.py"] == {}


def test_a_misspelt_option_and_a_wrong_result_are_seen(reports: dict[str, dict[int, str]]) -> None:
    refused = {number for number, line in enumerate(CALLS.splitlines(), 1) if line.endswith("# refused")}
    assert len(refused) == 28
    assert set(reports["calls.py"]) == refused


def test_the_checks_at_run_time_take_their_names_from_the_types() -> None:
    named = {
        options.BackendName: NAMES,
        options.DivergenceName: tuple(divergences.BY_NAME),
        options.Estimator: sampled.ESTIMATORS,
        options.Direction: topk_divergence.DIRECTIONS,
        options.Support: topk_divergence.SUPPORTS,
        options.Cost: transport.COSTS,
        options.Solver: SOLVERS,
        options.CandidateRule: candidates.CANDIDATE_RULES,
        options.GateRule: tuple(gate.GATE_VALUES),
        options.FalseAlarmMode: false_alarms.FALSE_ALARM_MODES,
        options.StudentWindow: windows.STUDENT_WINDOWS,
        options.WindowNoise: windows.WINDOW_NOISES,
        options.Reduction: config.REDUCTIONS,
        options.GuidanceReduction: config.GUIDANCE_REDUCTIONS,
        options.SelfTeacher: config.SELF_TEACHERS,
        options.ScoreName: config.SCORES,
        options.EmbeddingName: config.EMBEDDINGS,
    }
    assert len(named) == sum(typing.get_origin(value) is typing.Literal for value in vars(options).values())
    for literal, names in named.items():
        assert typing.get_args(literal) == names


def test_the_overloads_have_the_parameters_of_their_function() -> None:
    for function, flag in ((topd.linear_divergence, "return_scores"), (topd.linear_logprobs, "return_entropy")):
        own = inspect.signature(function).parameters
        overloads = [inspect.signature(each).parameters for each in typing.get_overloads(function)]
        assert len(overloads) == 3
        for parameters in overloads:
            assert list(parameters) == list(own)
            for name in parameters.keys() - {flag}:
                assert parameters[name] == own[name], name


def test_no_option_of_a_config_is_a_mere_string() -> None:
    for kind in (topd.OPDConfig, topd.TOPDConfig):
        types = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            assert types[field.name] is not str, field.name
            assert str not in typing.get_args(types[field.name]), field.name
