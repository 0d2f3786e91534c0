"""tools/versions.py: the versions that it runs are those that the extras promise, and the tests that it names are there."""

import tomllib
from pathlib import Path

import pytest

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


def test_a_test_belongs_to_the_first_package():
    assert files_for("trl==1.10.0,transformers==4.57.6")[0] == "tests/integrations/test_integrations_trl.py"
    assert "tests/models/test_head_from_model.py" in files_for("transformers==5.0.0")
