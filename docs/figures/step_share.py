"""The share of a SmolLM2 step that the loss takes, by eager torch, TRL and topd: `python docs/figures/step_share.py`.

The teacher is SmolLM2-135M-Instruct, the student six of its thirty layers with the shared embeddings. A step: both models'
forward, the reverse KL at every response token, the backward pass, AdamW. The three ways differ in the loss alone and take
turns, on the same rollouts; seconds are medians over the rounds. Rollouts are sampled once, before, and are no part of a bar;
their time is printed beside the table. Peak memory is resident memory at its high-water mark beyond weights and moments.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import topd
from topd.files import whole
from topd.integrations.rollouts import sample_rollouts
from topd.memory import peak_mib
from topd.plots import INK, LITERAL, PALETTE, new_figure
from topd.profiling.devices import device_words
from topd.profiling.timeline import HostClock, Timeline
from topd_bench.cases import Inputs
from topd_bench.ways import WAYS, installed
from topd_demo import smollm2

CPU = torch.device("cpu")
PICTURE = Path(__file__).parents[1] / "step-share.png"
NOWHERE = 49_152  # a token that the model does not have ends no response: each has its full length
QUESTIONS = (
    "Why is the sky blue?",
    "How does a bicycle stay upright?",
    "Write a short story about a lighthouse.",
    "Explain what a prime number is.",
    "What should one see in Rome?",
    "How is bread made?",
    "Describe the water cycle.",
    "What did the steam engine change?",
)
STAGES = ("teacher's forward", "student's forward", "loss", "loss, backward", "student's backward", "AdamW")
OF_LOSS = ("loss", "loss, backward")
COLORS = dict(zip(STAGES, ("#9DB8D2", "#5B8DB8", PALETTE[0], "#F0A26B", "#2F5D87", "#BBBBBB"), strict=True))


class Trainer:
    """A student, its teacher and AdamW; a step in each way."""

    def __init__(self, teacher: Any) -> None:
        self.teacher, self.student = teacher.requires_grad_(False), smollm2.sliced(teacher).train()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5)

    def rollouts(self, tokenizer: Any, tokens: int) -> dict[str, Tensor]:
        """Sample a response of so many tokens to each question."""
        tokenizer.padding_side = "left"
        chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
        options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
        prompts = tokenizer.apply_chat_template(chats, **options)
        torch.manual_seed(0)
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        return sample_rollouts(self.student, ids, mask, max_new_tokens=tokens, eos_token_id=NOWHERE)

    def step(self, way: str, batch: dict[str, Tensor]) -> tuple[dict[str, float], float | None]:
        """Take a step; return seconds by stage, and the peak in MiB."""
        self.optimizer.zero_grad(set_to_none=True)
        timeline = Timeline(HostClock())
        with peak_mib(CPU) as peak:
            timeline.switch("teacher's forward")
            inputs = batch["input_ids"], batch["attention_mask"]
            with torch.no_grad():
                teacher_hidden, teacher = topd.hidden_states(self.teacher, *inputs)
            timeline.switch("student's forward")
            student_hidden, student = topd.hidden_states(self.student, *inputs)
            rows = topd.next_token_mask(batch["response_mask"]).bool()
            timeline.switch("loss")
            taken = Inputs(student_hidden[rows], student.weight, teacher_hidden[rows], teacher.weight.detach(), None)
            values, *kept = WAYS[way](taken, "reverse_kl")
            loss = values.mean()
            timeline.switch("loss, backward")
            student_hidden.register_hook(lambda _: timeline.switch("student's backward"))
            loss.backward()
            timeline.switch("AdamW")
            del kept, values, loss
            self.optimizer.step()
            timeline.close()
            mib = peak()
        return timeline.seconds, mib


def measured(tokens: int, rounds: int) -> dict[str, Any]:
    """Return seconds by stage and the peak of each way that is installed, medians over the rounds."""
    torch.manual_seed(0)
    trainer = Trainer(smollm2.load_model())
    start = time.perf_counter()
    batch = trainer.rollouts(smollm2.load_tokenizer(), tokens)
    sampling = time.perf_counter() - start
    ways = installed()
    steps: dict[str, list[tuple[dict[str, float], float | None]]] = {way: [] for way in ways}
    for place in range(rounds + 1):  # the first warms up
        for way in ways:
            taken = trainer.step(way, batch)
            if place:
                steps[way].append(taken)
            print(f"round {place} of {rounds}: {way} {sum(taken[0].values()):.2f} s", file=sys.stderr, flush=True)
    median = {
        way: {stage: statistics.median(seconds[stage] for seconds, _ in each) for stage in STAGES}
        for way, each in steps.items()
    }
    peaks = {way: max((mib for _, mib in each if mib is not None), default=None) for way, each in steps.items()}
    whole_steps = {way: [sum(seconds.values()) for seconds, _ in each] for way, each in steps.items()}
    ranges = {way: (min(each), max(each)) for way, each in whole_steps.items()}
    count = int(batch["response_mask"].sum())
    return {
        "seconds": median,
        "range": ranges,
        "peak_mib": peaks,
        "tokens": count,
        "rows": len(QUESTIONS),
        "sampling": sampling,
    }


def share(seconds: dict[str, float]) -> float:
    """Return the loss's share of a step."""
    return sum(seconds[stage] for stage in OF_LOSS) / sum(seconds.values())


def table(result: dict[str, Any]) -> str:
    """Return the table that the page shows."""
    lines = [
        f"SmolLM2-135M teacher, 6-layer student, {result['rows']} rollouts, {result['tokens']:,} response tokens, float32, "
        f"{device_words(CPU)}, torch {torch.__version__}; sampling them took {result['sampling']:.1f} s",
        "",
        f"| seconds | {' | '.join(STAGES)} | step (its range) | loss's share | peak, MiB |",
        "| --- |" + " ---: |" * (len(STAGES) + 3),
    ]
    for way, seconds in result["seconds"].items():
        cells = [f"{seconds[stage]:.2f}" for stage in STAGES]
        peak = result["peak_mib"][way]
        least, most = result["range"][way]
        cells += [
            f"{sum(seconds.values()):.2f} ({least:.2f} to {most:.2f})",
            f"{100 * share(seconds):.0f} %",
            "-" if peak is None else f"{peak:,.0f}",
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a bar a way, its stages from left to right as they run; the loss in orange and hatched."""
    ways = list(result["seconds"])
    figure = new_figure(9.0, 1.6 + 0.62 * len(ways))
    height = figure.get_figheight()
    axes = figure.add_axes((0.08, 1.0 / height, 0.76, 0.62 * len(ways) / height))
    longest = max(sum(seconds.values()) for seconds in result["seconds"].values())
    for row, way in enumerate(ways):
        start = 0.0
        for stage in STAGES:
            seconds = result["seconds"][way][stage]
            style: dict[str, Any] = {"hatch": "//"} if stage in OF_LOSS else {}
            label = stage if row == 0 else None
            axes.barh(row, seconds, left=start, height=0.72, color=COLORS[stage], edgecolor="white", label=label, **style)
            if seconds > 0.045 * longest:
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2}
                axes.text(
                    start + seconds / 2, row, f"{seconds:.2f}", ha="center", va="center", fontsize=8.5, bbox=box, **LITERAL
                )
            start += seconds
        peak = result["peak_mib"][way]
        words = f"loss {100 * share(result['seconds'][way]):.0f} %" + ("" if peak is None else f"\npeak {peak:,.0f} MiB")
        axes.text(start + 0.01 * longest, row, words, va="center", fontsize=9, **LITERAL)
    axes.set_yticks(range(len(ways)), ways)
    axes.set(xlim=(0, 1.01 * longest), ylim=(len(ways) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0, labelsize=11, labelcolor=INK)
    axes.set_xlabel("seconds of a training step, without sampling its rollouts", color=INK)
    axes.spines[["left", "right", "top"]].set_visible(False)
    title = f"A SmolLM2 step of {result['tokens']:,} response tokens: what the loss takes (hatched)"
    figure.text(0.02, 1 - 0.24 / height, title, va="center", fontsize=12, **LITERAL)
    figure.legend(loc="lower center", bbox_to_anchor=(0.46, 0.0), ncols=6, frameon=False, fontsize=8.5, labelcolor=INK)
    with whole(path) as unfinished:
        figure.savefig(unfinished, format="png")


def main() -> int:
    """Run the command."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--tokens", type=int, default=128, help="of a response (default 128)")
    words.add_argument("--rounds", type=int, default=3, help="of each way (default 3)")
    words.add_argument("--out", type=Path, default=PICTURE, help="the picture (default docs/step-share.png)")
    arguments = words.parse_args()
    if missing := smollm2.missing():
        print(missing, file=sys.stderr)
        return 1
    try:
        result = measured(arguments.tokens, arguments.rounds)
    except KeyboardInterrupt:
        return 130
    print(table(result))
    draw(result, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
