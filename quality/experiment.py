"""Does it teach: train students by each method on tasks with an exact verifier, with paired seeds; print tables, draw curves.

Results go to OUT/TASK.jsonl as runs end; a call does what is missing there. The tables are of all that the files hold.
"""

import argparse
import multiprocessing
import signal
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from quality.figures import draw, draw_differences
from quality.methods import ROWS
from quality.models import Schooling, schooled
from quality.results import Results, key_of
from quality.settings import SETTINGS
from quality.tables import tables
from quality.tasks import TASKS
from quality.training import Job, Record, run
from topd.cli.errors import INTERRUPTED
from topd.cli.options import positive
from topd_bench.report import note

SEEDS = 8


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    command = argparse.ArgumentParser(prog="python -m quality.experiment", description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    command.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    command.add_argument("--seeds", type=positive, default=SEEDS, help=f"how many, from 0 on (default {SEEDS})")
    command.add_argument("--steps", type=positive, default=None, help="on-policy steps of a run (default: the task's)")
    command.add_argument("--jobs", type=positive, default=2, help="processes of a thread each (default 2)")
    command.add_argument("--out", type=Path, default=Path("quality-results"), help="folder (default quality-results)")
    command.add_argument("--report-only", action="store_true", help="train nothing: tables and curves of what is there")
    return command


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Return the runs asked for: all rows of a seed before the next seed, so that what is there early is paired."""
    jobs = []
    for seed in range(options.seeds):
        for task in options.tasks:
            settings = SETTINGS[task] if options.steps is None else replace(SETTINGS[task], steps=options.steps)
            jobs += [Job(task, seed, row, settings, options.out / "models") for row in options.rows]
    return jobs


def start_worker() -> None:
    """Set a worker up: one thread; an interrupt is the parent's to handle."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def one_thread_here() -> Iterator[None]:
    """Take one thread meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def school(work: tuple[str, Schooling], folder: Path) -> None:
    """Train a model that is missing in the folder."""
    task, schooling = work
    schooled(TASKS[task], schooling, folder, note)


def timed_run(job: Job) -> tuple[Record, float]:
    """Return a run's record and its seconds."""
    start = time.perf_counter()
    return run(job, note), time.perf_counter() - start


def finished(jobs: Sequence[Job], processes: int) -> Generator[tuple[Record, float], None, None]:
    """Yield runs as they end, after the models that they start from are there."""
    if not jobs:
        return
    models = [(job.task, job.settings.teacher()) for job in jobs] + [(job.task, job.settings.student(job.seed)) for job in jobs]
    missing = list(dict.fromkeys(models))
    prepare = partial(school, folder=jobs[0].folder)
    if processes == 1:
        with one_thread_here():
            for model in missing:
                prepare(model)
            yield from map(timed_run, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes, start_worker) as pool:
        pool.map(prepare, missing, chunksize=1)
        yield from pool.imap_unordered(timed_run, jobs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parser().parse_args(arguments)
    results = {task: Results(options.out / f"{task}.jsonl") for task in options.tasks}
    jobs = [] if options.report_only else [job for job in jobs_of(options) if not results[job.task].has(job)]
    status = 0
    try:
        with closing(finished(jobs, options.jobs)) as runs:
            for number, (record, seconds) in enumerate(runs, 1):
                results[record["task"]].add(record)
                task, seed, row = key_of(record)
                ends = [record["curve"][place]["accuracy"] for place in (0, -1)]
                note(f"{number}/{len(jobs)} {task} seed {seed} {row}: {ends[0]:.2f} -> {ends[1]:.2f}, {seconds:.0f} s")
    except KeyboardInterrupt:
        note("interrupted: what had ended is kept; the same command goes on from there")
        status = INTERRUPTED
    ended = {task: held.records for task, held in results.items() if held.records}
    for task, records in ended.items():
        print(tables(task, records))
        note(f"curves: {draw(task, records, options.out)}")
    if ended:
        note(f"differences: {draw_differences(ended, options.out / 'differences.png')}")
    return status


if __name__ == "__main__":
    sys.exit(main())
