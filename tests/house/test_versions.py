"""tools/versions.py: the versions that it runs are those that the extras promise, and the tests that it names are there."""

import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from tools import triton_versions
from tools.versions import LOWEST, REQUESTS, TRANSFORMERS, TRL, files_for

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_files_for_a_version_are_there(request_):
    assert all((ROOT / path).is_file() for path in files_for(request_))


def test_the_extras_are_what_is_run():
    assert f"trl>={TRL[0].removesuffix('.0')},<1.17" in EXTRAS["trl"]
    assert TRL[-1].startswith("1.16.")
    range_ = f"transformers>={TRANSFORMERS[0]},<5.24"
    assert [range_ in EXTRAS[extra] for extra in ("transformers", "trl", "flash-attn")] == [True] * 3
    assert TRANSFORMERS[-1].startswith("5.23.")
    assert f"trl=={TRL[0]},transformers=={TRANSFORMERS[0]}" == LOWEST


def test_the_versions_of_triton_that_are_run_span_the_extra():
    versions = list(triton_versions.VERSIONS)
    assert EXTRAS["triton"] == [f"triton>={versions[0].removesuffix('.0')},<3.10"]
    assert versions[-1].startswith("3.9.")
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    assert f"triton=={versions[-1]}" in pinned
    assert (ROOT / "tests/kernels").is_dir()
    assert "tests/kernels" in triton_versions.TESTS


def test_the_page_of_what_is_supported_names_these_versions():
    """What make versions and make triton-versions run, what requirements.txt pins, and what the extras allow."""
    page = (ROOT / "docs/support.md").read_text()
    rows = {row.split("|")[1].strip(): row for row in page.splitlines() if row.startswith("|")}
    for package, versions in (("transformers", TRANSFORMERS), ("TRL", TRL), ("Triton", list(triton_versions.VERSIONS))):
        assert ", ".join(versions) in rows[package]
    pinned = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    for row in ("numpy", "accelerate", "PEFT"):
        assert f"tested: {pinned[row.lower()]}" in rows[row]
    assert pinned["openai"] in rows["openai (for `topd refine`)"]
    assert f"{pinned['scipy']}, {pinned['POT']}" in rows["scipy, POT (for exact transport)"]
    assert "torch==2.13.0" in (ROOT / "Makefile").read_text()
    assert "tested: 2.13.0" in rows["torch"]


def test_the_citation_has_the_packages_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize(("failed", "spills", "verdict"), [(0, 0, 0), (1, 0, 1), (0, 2, 1)])
def test_a_version_passes_where_its_tests_pass_and_its_binaries_fit(failed, spills, verdict, monkeypatch, capsys):
    """One line a version, whatever the first one says; the table comes last."""

    def run(*command: str) -> "subprocess.CompletedProcess[str]":
        if "tools.aot" not in command:
            last = f"{failed} failed, 3 passed, 7 warnings in 1.5s (0:00:01)"
            return subprocess.CompletedProcess(command, failed, f"...\n{last}\n")
        numbers = {"registers": 40, "stack_bytes": 0, "spills": spills, "shared_bytes": 16}
        Path(command[command.index("--json") + 1]).write_text(json.dumps([numbers, {**numbers, "spills": 0, "registers": 8}]))
        return subprocess.CompletedProcess(command, 1 if spills else 0, "")

    monkeypatch.setattr(triton_versions, "environment", lambda request: Path("python of", request))
    monkeypatch.setattr(triton_versions, "_run", run)
    assert triton_versions.main(["3.6.0", "3.9.0"]) == verdict
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    word = "NO" if verdict else "yes"
    line = f"{failed} failed, 3 passed"
    assert cells == [[version, line, "2", "40", "0", str(spills), "16", word] for version in ("3.6.0", "3.9.0")]


def test_the_document_gets_a_table_of_all_versions_alone(monkeypatch, tmp_path, capsys):
    """docs/gpu.md has a line for each version that is run, between its marks."""
    document = triton_versions.DOCS.read_text()
    table = document.partition(f"<!-- {triton_versions.MAKE_VERSIONS} -->\n")[2].partition("<!-- end -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert lines[0] == list(triton_versions.HEADS)
    assert [line[0] for line in lines[2:]] == list(triton_versions.VERSIONS)
    assert {(line[4], line[5], line[7]) for line in lines[2:]} == {("0", "0", "yes")}

    monkeypatch.setattr(triton_versions, "DOCS", tmp_path / "gpu.md")
    monkeypatch.setattr(triton_versions, "environment", lambda request: Path(request))
    monkeypatch.setattr(triton_versions, "interpreted", lambda python: (True, "9 passed"))
    monkeypatch.setattr(triton_versions, "compiled", lambda python: (True, ["4", "64", "0", "0", "16"]))
    triton_versions.DOCS.write_text(document)
    assert triton_versions.main(["3.6.0"]) == 0
    assert triton_versions.DOCS.read_text() == document
    with pytest.raises(SystemExit):
        triton_versions.main(["3.6.0", "--write"])
    assert triton_versions.main(["--write"]) == 0
    assert triton_versions.DOCS.read_text().count("| 9 passed ") == 3
    capsys.readouterr()


def test_a_test_belongs_to_the_first_package():
    assert files_for("trl==1.10.0,transformers==4.57.6")[0] == "tests/integrations/test_integrations_trl.py"
    assert "tests/models/test_head_from_model.py" in files_for("transformers==5.0.0")
