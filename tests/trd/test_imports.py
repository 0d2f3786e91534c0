"""`import topd.trd` brings in nothing that an installation without extras lacks, or that takes long."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_hosts_and_clients_are_imported_when_they_are_used():
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'python_api')!r}, {str(ROOT)!r}]\n"
        "import topd.trd\n"
        "print(sorted({'transformers', 'openai', 'rich', 'httpx', 'httpx2'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_everything_public_is_there():
    import topd.trd

    assert topd.trd.__all__ == sorted(topd.trd.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(hasattr(topd.trd, name) for name in topd.trd.__all__)
