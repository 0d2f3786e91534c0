"""README's install line in a fresh environment, with a compiler and without one: what the first commands print.

`make install-check` runs it (some minutes: it installs torch twice and builds the extension once).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
README_LINES = ("pip install setuptools ninja", "pip install --no-build-isolation .")
NO_COMPILER = {"CC": "/nonexistent", "CXX": "/nonexistent"}
LINE = 'topd runs CPU calls on its slower backend "eager": the C++ extension was not built'


class Environment:
    """A virtual environment in a folder, with topd as README installs it from a copy of this tree."""

    def __init__(self, folder: Path, compiler: dict[str, str]) -> None:
        self.folder = folder
        self.variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TOPD_BUILD_CPP")}
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        source = folder / "clone"
        shutil.copytree(
            ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv*", "*.so", "build", "*.egg-info", "topd-demo*")
        )
        for line in (f"pip install {TORCH}", *README_LINES):
            command = [self.bin("python"), "-m", *line.split(), "--quiet", "--disable-pip-version-check"]
            subprocess.run(command, cwd=source, env=self.variables | compiler, check=True)

    def bin(self, name: str) -> str:
        return str(self.folder / "venv" / "bin" / name)

    def output(self, *command: str, status: int = 0) -> str:
        """Both streams of a command that runs outside of the clone."""
        words = [self.bin(command[0]), *command[1:]]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(words, cwd=self.folder, env=self.variables, text=True, check=False, **streams)
        print(f"$ {' '.join(command)}\n{done.stdout}")
        assert done.returncode == status, f"exit status {done.returncode}, not {status}"
        assert "numpy" not in done.stdout.lower()
        return done.stdout


def check(folder: Path, *, compiler: bool) -> None:
    """
    Raises:
        AssertionError: a command printed, or ended with, something else than it should.
    """
    environment = Environment(folder, {} if compiler else NO_COMPILER)
    version = environment.output("topd", "--version")
    assert re.fullmatch(r"topd \d+\.\d+\.\d+\n", version)
    assert environment.output("python", "-c", "import topd; print('topd', topd.__version__)") == version
    assert environment.output("python", "-W", "error", "-c", "import topd") == ""

    readme = (ROOT / "README.md").read_text()
    assert all(line in readme for line in README_LINES)
    shutil.copy(ROOT / "examples" / "first_loss.py", folder)  # README's own models are of transformers, which is an extra
    loss = environment.output("python", "first_loss.py")
    assert re.search(r"reverse KL +[\d.]+ nats", loss)
    assert loss.count(LINE) == (0 if compiler else 1)
    assert loss.count("Warning") == (0 if compiler else 1)

    doctor = environment.output("topd", "doctor", status=0 if compiler else 1)
    assert doctor.count(LINE) == (0 if compiler else 1)
    assert doctor.startswith("versions" if compiler else LINE)
    assert bool(re.search(r"cpp, cpu +ok", doctor)) == compiler
    assert bool(re.search(r"cpp, cpu +FAILED", doctor)) != compiler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", choices=("with", "without"), help="one of the two alone")
    wish = parser.parse_args().compiler
    for name in ("without", "with"):
        if wish in (None, name):
            print(f"--- {name} a compiler", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                check(Path(folder), compiler=name == "with")
    print("as it should be")


if __name__ == "__main__":
    main()
