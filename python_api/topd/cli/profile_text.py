"""What `topd profile` predicts, for a reader."""

from typing import Any

from topd.costs import memory
from topd.losses.plan import TFLOP
from topd.memory import size_text

LEFT_OUT = (
    "  not in the table: rollouts and, for trd, the teacher's refinement (made before the step),",
    "  attention's own products (they grow with the length), norms, launches from the host",
)


def text(report: dict[str, Any]) -> str:
    """Return the report for a reader."""
    case, chunks = report["case"], report["plan"]
    head = "frozen head" if case["frozen_head"] else "trained head"
    lines = [
        f"PREDICTION, nothing was measured: {case['loss']} of {case['n']:,} tokens, vocabulary {case['vocab']:,},",
        f"hidden {case['student_width']:,} (teacher {case['teacher_width']:,}), {case['dtype']}, {head}, {report['device']}",
        "",
        f"chunks      {chunks['chunks']:,} of up to {chunks['rows']:,} rows, gradients of {chunks['pile']} to a product",
        f"workspace   {size_text(chunks['workspace_bytes'])}, backend {report['backend']}",
        f"products    {chunks['flop'] / TFLOP:,.3g} Tflop",
        _time_line(report["time"]),
        "",
        "peak memory beyond weights and hidden states",
    ]
    for name, parts in report["memory_bytes"].items():
        spelled = ", ".join(f"{part} {size_text(size)}" for part, size in parts.items() if size)
        lines.append(f"  {name:<6}{size_text(memory.total(parts)):>12}  = {spelled}")
    lines += [f"  never allocated (eager - topd): {size_text(report['never_allocated_bytes'])}", "", _fits_line(report)]
    if "step" in report:
        lines += ["", *_step_lines(report)]
    if "tp" in report:
        lines += ["", *_rank_lines(report)]
    return "\n".join(lines)


def _time_line(time: dict[str, Any] | None) -> str:
    if time is None:
        return "time        not predicted: the model knows GPUs and 16-bit operands alone"
    parts = ", ".join(f"{name} {time[f'{name}_ms']:.1f}" for name in ("products", "bytes", "issue"))
    return f"time        {time['total_ms']:.1f} ms with topd ({parts}); bound by {time['bound']}"


def _fits_line(report: dict[str, Any]) -> str:
    fit = report["fits"]
    if fit is None:
        return "loss fits   not said of a CPU: its memory is not one device's"
    answers = ", ".join(f"{name} {'yes' if yes else 'NO'}" for name, yes in fit["fits"].items())
    return (
        f"loss fits   {answers}; in {size_text(fit['memory_bytes'])}, without optimizer and activations,\n"
        f"            beside {size_text(fit['weights_bytes'])} of weights ({fit['weights']})"
    )


def _step_lines(report: dict[str, Any]) -> list[str]:
    """Return the table of a step."""
    step, case = report["step"], report["case"]
    lines = [f"a step of {step['method']}, PREDICTED: {case['n']:,} tokens, the teacher reads {step['teacher_tokens']:,}"]
    if step["candidates"]:
        lines.append(
            f"  {step['candidates']:,} candidates with windows of {step['horizon']} tokens by both models, trajectories of "
            f"{step['length']:,} tokens"
        )
    width = max(len(stage["name"]) for stage in step["stages"])
    lines.append(f"  {'stage':<{width}}  {'Tflop':>8}  {'ms':>9}  {'bound by':<16}  memory it holds")
    lines += [f"  {_stage_cells(stage, width)}" for stage in step["stages"]]
    if step["seconds"]:
        lines.append(
            f"  {'all':<{width}}  {'':>8}  {1e3 * step['seconds']:>9,.1f}  the loss takes {100 * step['loss_share']:.1f} %"
        )
    else:
        lines.append("  no sum: a stage's time is not predicted")
    if step["held_bytes"]:
        lines += _held(step["held_bytes"], report["fits"])
    if not step["checkpointing"]:
        lines.append("  activations depend on the model's code: not predicted; --checkpointing counts what is kept then")
    return [*lines, *LEFT_OUT]


def _held(sizes: dict[str, int], fit: dict[str, Any] | None) -> list[str]:
    """Return what stands beside each other when the divergence is computed and its gradients are there, and whether it fits."""
    parts = " + ".join(f"{name} {size_text(size)}" for name, size in sizes.items())
    needed, verdict = sum(sizes.values()), ""
    if fit is not None:
        memory_text, left = size_text(fit["memory_bytes"]), fit["memory_bytes"] - needed
        verdict = f"; {size_text(left)} of {memory_text} are left for these" if left > 0 else f"; does NOT fit in {memory_text}"
    return [f"  held at once, beside activations: {size_text(needed)}{verdict}", f"    = {parts}"]


def _stage_cells(stage: dict[str, Any], width: int) -> str:
    if stage["note"]:
        return f"{stage['name']:<{width}}  not known of {stage['note']}"
    flop = "-" if not stage["flop"] else f"{stage['flop'] / TFLOP:,.3g}"
    ms = "-" if stage["seconds"] is None else f"{1e3 * stage['seconds']:,.1f}"
    held = "-" if stage["memory_bytes"] is None else size_text(stage["memory_bytes"])
    return f"{stage['name']:<{width}}  {flop:>8}  {ms:>9}  {stage['bound'] or '-':<16}  {held}"


def _rank_lines(report: dict[str, Any]) -> list[str]:
    """Return what a rank needs where heads are sharded."""
    rank, n = report["tp"], report["case"]["n"]
    statistics, hidden = rank["statistics_bytes_a_row"], rank["grad_hidden_bytes_a_row"]
    lines = [
        f"heads sharded over the vocabulary among {rank['ranks']} ranks, PREDICTED, of the loss alone; on one rank:",
        f"  vocabulary   {rank['vocab']:,} entries",
        f"  weights      student {size_text(rank['student_weight_bytes'])}, teacher {size_text(rank['teacher_weight_bytes'])}",
        f"  tiles        {size_text(rank['tile_bytes'])}: {rank['chunks']:,} chunks of up to {rank['rows']:,} rows",
        f"  d weight     {size_text(rank['grad_weight_bytes'])} in float32, complete without an exchange",
        f"  d hidden     {size_text(rank['grad_hidden_bytes'])} in float32, summed over the ranks",
        f"  peak         {size_text(rank['peak_bytes'])} beyond weights and hidden states",
        f"  products     {rank['flop'] / TFLOP:,.3g} Tflop",
        f"  {_time_line(rank['time'])}".replace("time        ", "time         "),
        f"  exchange     {statistics:,} B of statistics (top, rest) and {hidden:,} B of d hidden a row,",
        f"               {size_text(n * (statistics + hidden))} for {n:,} rows; its time is not in the line above",
    ]
    return lines + [f"  {rank['note']}"] * bool(rank["note"])
