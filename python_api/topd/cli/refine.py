"""`topd refine`: rollouts and refined trajectories through a server, into a file that a stopped run goes on with."""

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from topd.cli.errors import INTERRUPTED, CommandError, require
from topd.cli.options import nonempty, positive, seed
from topd.trd import FromServer, generate, summary
from topd.trd.pipeline import STAGES, Verify
from topd.trd.templates import TASKS

HELP = "have a server answer problems, or refine a student's answers"
DESCRIPTION = """\
Makes the data of trajectory-refined distillation (TRD) in two runs, each
through an OpenAI-compatible server such as vLLM or SGLang. First the student
answers the problems, then the teacher rewrites these answers:

  topd refine problems.jsonl --out rollouts.jsonl \\
      --url http://localhost:8000/v1 --model STUDENT
  topd refine rollouts.jsonl --stage refine --out refined.jsonl \\
      --url http://localhost:8001/v1 --model TEACHER
  topd refine refined.jsonl --summary

FILE holds a problem a line, as JSON: {"problem": "...", "id": "...",
"reference": "..."}; id and reference may be left out. The file at --out has
the settings in its first line, then a record for each answer, on the disk as
soon as it comes. A run that was stopped (Ctrl-C, a kill, a crash) goes on with
the same command: nothing that is in the file is asked for again.
topd.trd.batches makes token ids of it for training; docs/trd.md has the whole
way."""


def add_to(commands: Any) -> None:
    """Add the subcommand to those of argparse."""
    parser = commands.add_parser(
        "refine", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=existing, metavar="FILE", help="problems; with --stage refine the rollouts")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the records go")
    parser.add_argument("--stage", choices=STAGES, default="rollout", help="answer, or refine answers (default rollout)")
    parser.add_argument("--summary", action="store_true", help="print what a file of records holds, and end")
    server = parser.add_argument_group("server")
    server.add_argument("--url", type=nonempty, help="such as http://localhost:8000/v1")
    server.add_argument("--model", type=nonempty, metavar="NAME", help="the name by which the server knows the model")
    server.add_argument("--api-key-env", type=nonempty, metavar="NAME", help="the environment variable that holds the key")
    server.add_argument("--concurrency", type=positive, metavar="N", default=64, help="requests in flight (default 64)")
    server.add_argument("--timeout", type=positive, metavar="S", default=600, help="seconds for an answer (default 600)")
    server.add_argument("--retries", type=retries, metavar="N", default=5, help="tries after the first (default 5)")
    server.add_argument("--retry-failed", action="store_true", help="ask for the failed ones of an earlier run again")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--task", choices=tuple(TASKS), default="math", help="which words the prompts have (default math)")
    answers.add_argument("--with-reference", action="store_true", help="the refining teacher reads the reference too")
    answers.add_argument("--samples", type=positive, metavar="N", default=1, help="answers to a problem (default 1)")
    answers.add_argument("--temperature", type=number, metavar="X", default=0.6, help="0 is greedy (default 0.6)")
    answers.add_argument("--top-p", type=number, metavar="X", default=0.95, help="default 0.95")
    answers.add_argument("--top-k", type=top_k, metavar="N", default=20, help="-1: not sent to the server (default 20)")
    answers.add_argument(
        "--max-new-tokens", type=positive, metavar="N", default=16_384, help="room for an answer (default 16384)"
    )
    answers.add_argument(
        "--tokenizer", type=nonempty, metavar="NAME", help="of the hub, or a folder: measures the prompts and cuts them"
    )
    answers.add_argument(
        "--max-prompt-tokens",
        type=positive,
        metavar="N",
        help="needs --tokenizer (default 4096, code 2048; refine 18432, with the reference 22528)",
    )
    answers.add_argument(
        "--thinking", choices=("on", "off"), help="enable_thinking of the chat template (default off, to refine on)"
    )
    answers.add_argument("--no-chat", action="store_true", help="the plain prompt and a newline instead of a chat")
    answers.add_argument("--seed", type=seed, metavar="N", default=0, help="of the answers (default 0)")
    answers.add_argument(
        "--verify",
        type=nonempty,
        metavar="PLACE:NAME",
        help="a function (problem, answer) -> True, False or None, of a module or a .py file: check.py:is_right",
    )
    parser.set_defaults(run=run)


def existing(text: str) -> Path:
    path = Path(nonempty(text))
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"must name a file that is there, got {text!r:.60}")
    return path


def retries(text: str) -> int:
    return 0 if text == "0" else positive(text)


def top_k(text: str) -> int | None:
    return None if text == "-1" else positive(text)


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r:.60}") from error


def run(arguments: argparse.Namespace) -> int:
    """Return the exit status: 1 where an answer failed for good."""
    if arguments.summary:
        print(_one_line(summary, arguments.file))
        return 0
    if missing := [f"--{name}" for name in ("out", "url", "model") if getattr(arguments, name) is None]:
        raise CommandError(f"{', '.join(missing)} must be given; `topd refine --help` shows a whole run")
    require(("openai",), "a server", 'pip install "topd[server]"')
    try:
        done = _one_line(_generate, arguments)
    except (KeyboardInterrupt, SystemExit) as stop:
        print("topd refine: stopped; go on with the same command", file=sys.stderr)
        return INTERRUPTED if isinstance(stop, KeyboardInterrupt) else int(stop.code or 1)
    print(done)
    if failed := done.statuses.get("failed", 0):
        print(f"topd refine: {failed:,} failed; --retry-failed asks for them again", file=sys.stderr)
    return 1 if failed else 0


def _one_line(function: Any, argument: Any) -> Any:
    """Call the function; what it refuses becomes the command's one line."""
    try:
        return function(argument)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CommandError(" ".join(str(error).split())) from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error


def _generate(arguments: argparse.Namespace) -> Any:
    verify = None if arguments.verify is None else _loaded_function(arguments.verify)
    generator = FromServer(
        arguments.url,
        arguments.model,
        arguments.api_key_env,
        concurrency=arguments.concurrency,
        timeout=arguments.timeout,
        retries=arguments.retries,
    )
    return generate(
        arguments.file,
        generator,
        arguments.out,
        arguments.stage,
        verify,
        task=arguments.task,
        with_reference=arguments.with_reference,
        samples=arguments.samples,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_new_tokens=arguments.max_new_tokens,
        max_prompt_tokens=arguments.max_prompt_tokens,
        tokenizer=None if arguments.tokenizer is None else _tokenizer(arguments.tokenizer),
        chat=not arguments.no_chat,
        template_options=None if arguments.thinking is None else {"enable_thinking": arguments.thinking == "on"},
        seed=arguments.seed,
        retry_failed=arguments.retry_failed,
    )


def _tokenizer(name: str) -> Any:
    require(("transformers",), "--tokenizer", 'pip install "topd[transformers]"')
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:120]
        raise CommandError(f"--tokenizer {name} cannot be loaded ({reason}): name one of the hub or a folder") from error


def _loaded_function(place: str) -> Verify:
    """Return the function that PLACE:NAME names."""
    where, _, name = place.rpartition(":")
    if not where or not name:
        raise CommandError(f"--verify must be PLACE:NAME, such as check.py:is_right, got {place!r:.60}")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        function = getattr(module, name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        hint = "" if os.path.exists(where) else "; a file is named with .py at its end"
        raise CommandError(f"--verify {place}: {' '.join(str(error).split())}{hint}") from error
    if not callable(function):
        raise CommandError(f"--verify {place}: {name} is no function")
    verify: Verify = function
    return verify
