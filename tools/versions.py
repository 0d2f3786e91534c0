"""Run the tests that meet transformers and TRL under other versions of them, each in an environment of its own.

    make versions
    make versions VERSIONS="trl==1.12.0 transformers==5.0.0 trl==1.10.0,transformers==4.57.6"

An environment holds what differs and takes the rest from the project's, whose packages pip sees too: it installs the
tokenizers, huggingface_hub and so on that belong to the version asked for, and nothing else. The environments are kept under
the project's.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

TRL = ("1.10.0", "1.11.0", "1.12.0", "1.13.0", "1.14.2", "1.15.0", "1.16.0")
TRANSFORMERS = ("4.56.2", "4.57.6", "5.0.0", "5.6.2", "5.12.1", "5.20.2", "5.23.0")
LOWEST = "trl==1.10.0,transformers==4.56.2"
REQUESTS = (*(f"trl=={version}" for version in TRL), *(f"transformers=={version}" for version in TRANSFORMERS), LOWEST)
# Named beside transformers, so that pip looks for versions of them that fit.
BESIDE = ("accelerate", "datasets", "peft")
TESTS = {
    "trl": (
        "integrations/test_integrations_trl",
        "integrations/test_integrations_trl_guards",
        "integrations/test_trl_pairs",
        "integrations/test_trl_topk",
    ),
    "transformers": (
        "branching/test_window_hidden",
        "branching/test_windows",
        "integrations/test_accumulation",
        "integrations/test_integrations_peft",
        "integrations/test_integrations_rollouts",
        "integrations/test_integrations_tokenizers",
        "integrations/test_integrations_transformers",
        "integrations/test_objective_state",
        "integrations/test_refine_rollout",
        "integrations/test_trainer_mixing",
        "integrations/test_trainer_pairs",
        "integrations/test_trainers_topk",
        "models/test_head_from_model",
        "models/test_head_lora",
        "models/test_head_refusals",
        "objectives/test_opd",
        "objectives/test_opsd",
        "objectives/test_packed",
        "objectives/test_pairs",
        "objectives/test_topd",
        "objectives/test_topd_steps",
        "trd/test_from_model",
    ),
}


def environment(request: str) -> Path:
    """Return the interpreter of an environment that has the packages of `request`: trl==1.12.0, or several with commas."""
    folder = Path(sys.prefix) / "versions" / request
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        own = next((folder / "lib").glob("python*")) / "site-packages"
        (own / "project.pth").write_text(sysconfig.get_path("purelib"))
    packages = [*request.split(","), *(BESIDE if "transformers==" in request else ())]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], check=True)
    return python


def files_for(request: str) -> list[str]:
    """Return the test files that meet the first package of `request`."""
    return [f"tests/{name}.py" for name in TESTS[request.partition("==")[0]]]


def run(request: str) -> tuple[bool, str]:
    """Run the tests of `request`, and return what `verdict` does."""
    command = [str(environment(request)), "-m", "pytest", "-q", "-p", "no:cacheprovider", *files_for(request)]
    return verdict(subprocess.run(command, stdout=subprocess.PIPE, text=True))


def verdict(done: "subprocess.CompletedProcess[str]") -> tuple[bool, str]:
    """Return whether all tests of a run of pytest passed, and its last line. What failed is printed."""
    if done.returncode:
        print(done.stdout, flush=True)
    return done.returncode == 0, done.stdout.strip().splitlines()[-1] if done.stdout else "pytest did not start"


def main(requests: list[str]) -> int:
    """Run every request; 1 where a test failed."""
    results = []
    for request in requests or REQUESTS:
        passed, line = run(request)
        results.append(passed)
        print(f"{request:<36} {line}", flush=True)
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
