"""What the terminal shows while a run goes on: a line that moves, or plain lines where nobody watches."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from topd.cli.options import DEMO_METHODS
from topd_demo.figures import NAMES
from topd_demo.settings import Settings
from topd_demo.summary import Table as Numbers
from topd_demo.training import Record
from topd_demo.window_pair import WindowPair

BAR = 6  # columns
LINKS = 4  # of a transport plan
PLAIN_EVERY = 5  # steps between two lines where the output is no terminal


class Display:
    """The terminal of one run of the demo."""

    def __init__(self, settings: Settings, console: Console | None = None) -> None:
        self.settings, self.console = settings, console or Console(highlight=False)
        self.live: Live | None = None
        self.method, self.began, self.first = "", 0.0, 0
        self.latest: Record = {}
        self.held_out = ""

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False)

    def start(self, method: str, done: int) -> None:
        """Begin to show a method's training, or go on."""
        self.method, self.began, self.first = method, time.monotonic(), done
        self.latest, self.held_out = {"step": done}, ""
        if self.console.is_terminal:
            self.live = Live(self._line(), console=self.console, refresh_per_second=4)
            self.live.start()

    def show(self, record: Record) -> None:
        """Show a step, or an evaluation."""
        if "loss" in record:
            self.latest = record
        else:
            self.held_out = _held_out(record)
        if self.live is not None:
            self.live.update(self._line())
        elif "loss" not in record or record["step"] % PLAIN_EVERY == 0:
            self.console.print(self._text(), markup=False)

    def stop(self) -> None:
        """Leave the method's line as it is."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def left(self) -> str:
        """Return the time left to this method, at the pace of its steps so far; at its end the time it took."""
        done, left = self.latest["step"] - self.first, self.settings.steps - self.latest["step"]
        passed = time.monotonic() - self.began
        if not left:
            return f"in {_clock(passed)}"
        return f"{_clock(passed / done * left)} left" if done else "-:-- left"

    def _line(self) -> Table:
        """Return the line that moves."""
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.settings.steps, completed=self.latest["step"], width=BAR)
        grid.add_row(Text(f"{NAMES[self.method]:4}", style="bold"), bar, Text(self._numbers()))
        return grid

    def _text(self) -> str:
        """Return the plain line."""
        return f"{NAMES[self.method]:4} {self._numbers()}"

    def _numbers(self) -> str:
        """Return the step's numbers; beside the method and the bar they fit 80 columns."""
        parts = [f"{self.latest['step']:>3}/{self.settings.steps}"]
        if "loss" in self.latest:
            parts.append(f"loss {self.latest['loss']:.2f}")
        if self.held_out:
            parts.append(self.held_out)
        if "loss" in self.latest:
            if self.method in DEMO_METHODS:
                parts.append(f"{self.latest['tokens_a_second']:.0f} tok/s")
            if self.latest["memory_mib"] is not None:
                parts.append(f"{self.latest['memory_mib'] / 1024:.1f} GiB")
        return " ".join([*parts, self.left()])

    def table(self, title: str, numbers: Numbers) -> None:
        """Show a table."""
        header, rows = numbers
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for place, name in enumerate(header):
            table.add_column(name, justify="right" if place else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(Text(f"\n{title}", style="bold"), table)

    def sample(self, title: str, prompt: str, answers: Mapping[str, str]) -> None:
        """Show a prompt with the answers to it, by name."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row(Text("prompt", style="dim"), Text(one_line(prompt)))
        for name, answer in answers.items():
            grid.add_row(Text(name, style="dim"), Text(one_line(answer)))
        self.console.print(Text(f"\n{title}", style="bold"), grid)

    def window_pair(self, pair: WindowPair) -> None:
        """Show the two continuations, and which of their tokens the plan moves the most mass between."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row(Text("prefix", style="dim"), Text(f"... {one_line(pair.prefix)}"))
        for name, tokens in (("student", pair.student_tokens), ("teacher", pair.teacher_tokens)):
            grid.add_row(Text(name, style="dim"), Text(one_line("".join(tokens))))
        links = ", ".join(f"{a!r} to {b!r} {share:.1%}" for a, b, share in pair.heaviest(LINKS))
        grid.add_row(Text("plan", style="dim"), Text(f"{links}, ..."))
        kind = "a divergent point" if pair.divergent else "a false alarm"
        title = f"\nTwo near futures, {kind}: distance {pair.distance:.2f}"
        self.console.print(Text(title, style="bold"), grid)


def _held_out(record: Record) -> str:
    """Return what an evaluation says."""
    if "held_out_reverse_kl" in record:
        return f"held-out KL {record['held_out_reverse_kl']:.2f}"
    return f"KL {record['held_out_kl']:.2f}, {record['held_out_right']:.0%} right"


def _clock(seconds: float) -> str:
    """Return minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def one_line(text: str) -> str:
    """Return a text as a terminal may print it: whatever a model wrote, no control character."""
    return "".join(c if c.isprintable() else "·" for c in " ".join(text.split()))
