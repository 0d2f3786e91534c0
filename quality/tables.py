"""The tables of a task's runs, in Markdown."""

import math
import statistics
from collections.abc import Mapping, Sequence

from quality.methods import ROWS
from quality.statistics import area, paired_interval
from quality.training import Record
from topd_bench.report import markdown_table

BASELINE = "opd"
COUNTS = ("real_divergent", "real_alarm", "surface_divergent", "surface_alarm")


def by_row(records: Sequence[Record]) -> dict[str, dict[int, Record]]:
    """Return each row's records by seed, in the order of the rows."""
    return {
        name: {record["seed"]: record for record in records if record["row"] == name}
        for name in ROWS
        if any(record["row"] == name for record in records)
    }


def areas(record: Record, axis: str, end: float) -> float:
    """Return the mean accuracy of a run up to `end` on an axis, "step" or "flop"."""
    curve = record["curve"]
    return area([point[axis] for point in curve], [point["accuracy"] for point in curve], end)


def area_over_steps(record: Record) -> float:
    """Return the mean accuracy of a whole run over its steps."""
    return areas(record, "step", record["curve"][-1]["step"])


def area_differences(runs: Mapping[int, Record], base: Mapping[int, Record]) -> list[float]:
    """Return a row's areas over steps minus the baseline's, seed by seed where both ran."""
    return [area_over_steps(run) - area_over_steps(base[seed]) for seed, run in runs.items() if seed in base]


def tables(task: str, records: Sequence[Record]) -> str:
    """Return the tables of a task: accuracy, and what the gate did."""
    plan = records[0]["plan"]
    head = (
        f"\n{task}: {plan['steps']} on-policy steps of {plan['batch']} rollouts, {plan['problems']} held-out problems; "
        f"a student's supervised steps end at {plan['student_enough']:.0%} right or more\n"
    )
    return "\n".join([head, accuracy_table(records), "", gate_table(records)])


def accuracy_table(records: Sequence[Record]) -> str:
    """Return the rows' accuracy, and their paired differences from OPD where that ran on the same seeds."""
    rows = by_row(records)
    base = rows.get(BASELINE, {})
    lines = []
    for name, runs in rows.items():
        paired = [seed for seed in runs if seed in base]
        ends = {seed: base[seed]["curve"][-1]["flop"] for seed in paired}
        ends = {seed: min(end, runs[seed]["curve"][-1]["flop"]) for seed, end in ends.items()}
        over_steps = area_differences(runs, base)
        over_compute = [areas(runs[seed], "flop", ends[seed]) - areas(base[seed], "flop", ends[seed]) for seed in paired]
        ratio = [runs[seed]["curve"][-1]["flop"] / base[seed]["curve"][-1]["flop"] for seed in paired]
        lines.append(
            [
                ROWS[name].text,
                str(len(runs)),
                *(spread([run["curve"][place]["accuracy"] for run in runs.values()]) for place in (0, -1)),
                spread([area_over_steps(run) for run in runs.values()]),
                *(["-"] * 2 if name == BASELINE else [difference(over_steps), difference(over_compute)]),
                f"{statistics.mean(ratio):.2f}" if ratio else "-",
            ]
        )
    header = ["row", "seeds", "start", "end", "area over steps", "minus OPD", "over compute, minus OPD", "flop / OPD"]
    return markdown_table(header, lines)


def gate_table(records: Sequence[Record]) -> str:
    """Return what the gate let through, beside the oracle: a real candidate is one that is not surface."""
    lines = []
    for name, runs in by_row(records).items():
        gates = [run["gate"] for run in runs.values() if "gate" in run]
        if not gates:
            continue
        counts = {key: sum(third[key] for gate in gates for third in gate) for key in COUNTS}
        real, through = counts["real_divergent"] + counts["real_alarm"], counts["real_divergent"] + counts["surface_divergent"]
        surface = [surface_share([gate[place] for gate in gates]) for place in range(len(gates[0]))]
        auc = [third["distance_auc"] for gate in gates for third in gate if third["distance_auc"] is not None]
        lines.append(
            [
                ROWS[name].text,
                str(sum(counts.values())),
                ", ".join(f"{value:.0%}" for value in surface),
                f"{share(real, sum(counts.values())):.0%}",
                f"{share(counts['real_divergent'], through):.0%}",
                f"{share(counts['real_divergent'], real):.0%}",
                f"{statistics.mean(auc):.2f}" if auc else "-",
            ]
        )
    header = ["row", "candidates", "surface, by thirds", "real", "precision", "recall", "AUC of the distance"]
    return markdown_table(header, lines) if lines else ""


def surface_share(thirds: Sequence[Record]) -> float:
    """Return the share of surface tokens among the candidates of some thirds."""
    surface = sum(third["surface_divergent"] + third["surface_alarm"] for third in thirds)
    return share(surface, sum(third[key] for third in thirds for key in COUNTS))


def share(part: float, whole: float) -> float:
    """Return part / whole; NaN where there is nothing."""
    return part / whole if whole else math.nan


def spread(values: Sequence[float]) -> str:
    """Return a mean and the standard deviation between seeds."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def difference(values: Sequence[float]) -> str:
    """Return a mean of paired differences and its 95 % interval."""
    mean, low, high = paired_interval(values)
    return "-" if math.isnan(mean) else f"{mean:+.3f}" + ("" if math.isnan(low) else f" ({low:+.3f} to {high:+.3f})")
