"""The demo is a user of the public API, as the examples are, and of what the commands of `topd` share."""

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "python_api" / "topd_demo"
PUBLIC = {"topd", "topd.plots", "topd.integrations.rollouts", "topd.trd"}
OF_THE_COMMANDS = {"topd.cli", "topd.cli.errors", "topd.cli.options", "topd.memory"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_a_module_of_the_demo_uses_nothing_else_of_topd(path):
    used = set(re.findall(r"^ *(?:from|import) (topd(?:\.\S+)?)(?: |$)", path.read_text(), re.MULTILINE))
    assert used <= PUBLIC | OF_THE_COMMANDS
