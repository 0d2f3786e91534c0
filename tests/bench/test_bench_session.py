"""A run of `topd bench` with stand-in jobs: rows as they come, deaths of processes, sizes that are not tried, an interrupt."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in import worker

from topd_bench.plans import Options
from topd_bench.session import Session

ROOT = Path(__file__).parents[2]
PEERS = ("ours", "eager", "trl")
ONE_JOB = Options("divergence", shapes=["tiny"], losses=["jsd"], heads=["frozen"], malloc="default", peers=PEERS)


def notes(session: Session) -> dict[str, str]:
    return {row["peer"]: row["note"] for row in session.fields}


def test_a_peer_that_kills_the_process_is_a_row_and_the_others_are_measured(tmp_path, capfd):
    code = """
for peer in request["peers"]:
    if peer not in request["skip"]:
        say(table="now", cells=[peer])
        if peer == "eager":
            os.kill(os.getpid(), signal.SIGKILL)
for peer in request["peers"]:
    row(peer, request["skip"].get(peer, ""), None if peer in request["skip"] else 2.0)
"""
    session = Session(ONE_JOB, tmp_path / "out.json", worker(code))
    assert session.run() == 0
    assert notes(session) == {"ours": "", "eager": "the process died: SIGKILL: ", "trl": ""}
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["complete"]
    assert [row["peer"] for row in report["rows"]] == ["ours", "eager", "trl"]
    assert report["machine"] == {"cpu": "none"}
    assert "the process died: SIGKILL" in capfd.readouterr().out


@pytest.mark.parametrize("now", ["", "say(table='now', cells=['ours']); "])
def test_a_death_of_topd_or_of_the_job_itself_is_a_failure(now, capfd):
    session = Session(ONE_JOB, None, worker(now + "raise OSError('no such thing')"))
    assert session.run() == 1
    (row,) = session.fields
    assert row["note"] == "the process died: exit status 1: OSError: no such thing"
    assert "no such thing" in capfd.readouterr().out


def test_a_sweep_does_not_try_what_would_exceed_a_limit(capfd):
    """eager takes 30 s at 64 tokens, so 60 s at 128 and 120 s at 256, of a limit of 100; TRL has no memory from 128 on."""
    code = """
n = request["shape"]["n"]
for peer in request["peers"]:
    why = request["skip"].get(peer, "out of memory" if peer == "trl" and n == 128 else "")
    row(peer, why, None if why else 1e3 * 30 * n / 64 if peer == "eager" else 1.0 * n)
"""
    sizes = {"sweep": "tokens", "points": (256, 64, 128)}
    options = Options("divergence", shapes=["tiny"], peers=PEERS, limit_seconds=100, **sizes)
    session = Session(options, None, worker(code))
    assert session.run() == 0
    told = [(row["shape"]["n"], row["peer"], row["note"]) for row in session.fields if row["note"]]
    assert told == [
        (128, "trl", "out of memory"),
        (256, "eager", "a call would take about 120 s, the limit is 100 s"),
        (256, "trl", "out of memory (at N = 128)"),
    ]
    header, rows = session.slopes()
    assert header[-1] == "slope: d log time / d log N"
    assert rows == [["reverse_kl", "trainable", "topd", "3", "1.000"], ["reverse_kl", "trainable", "eager", "2", "1.000"]]
    assert "### slopes over tokens" in capfd.readouterr().out


def test_an_interrupt_leaves_a_whole_report_and_says_so(tmp_path):
    path = tmp_path / "out.json"
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from stand_in import worker
from topd_bench.plans import Options
from topd_bench.session import Session
options = Options("divergence", shapes=["tiny"], malloc="default", peers=["ours"])
job = worker("row('ours', '', 2.0); time.sleep(60 * (request['head'] == 'frozen'))")
sys.exit(Session(options, Path({str(path)!r}), job).run())
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    end = time.monotonic() + 60
    while time.monotonic() < end and not (path.exists() and len(json.loads(path.read_text())["rows"]) == 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    report = json.loads(path.read_text())
    assert not report["complete"]
    assert [row["head"] for row in report["rows"]] == ["trainable", "frozen"]
    assert "### made up (incomplete)" in out
    assert f"what was measured until then is above and in {path}" in err
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]
