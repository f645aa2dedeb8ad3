"""A plan for people: a table, a verdict, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from sadkern.plan.estimate import Estimate, compared, estimate, largest_batch
from sadkern.plan.setting import GPUS, Setting
from sadkern.plan.track import Tracked

GIB = 1 << 30
LEFT = 2 * GIB  # for CUDA itself, what GEMMs work in and what an allocator cannot use
ROWS = {
    "student": "student's weights",
    "teacher": "teacher's weights",
    "optimizer": "optimizer's states",
    "gradients": "gradients",
    "activations": "activations",
    "loss": "loss: tiles, the head's gradient, the signal",
}


def budget_of(gpu: str) -> int:
    """Bytes that a step may take. ValueError: it is not known, and is no number of GiB."""
    try:
        budget = int((GPUS[gpu] if gpu in GPUS else float(gpu)) * GIB) - LEFT
        if budget <= 0:
            raise ValueError
        return budget
    except (ValueError, OverflowError):
        raise ValueError(
            f"gpu={gpu!r}: expected one of {', '.join(GPUS)}, or its memory in GiB, more than the "
            f"{LEFT / GIB:.0f} that are left to CUDA"
        ) from None


def described(x: Setting) -> str:
    """In a line."""
    parts = [
        f"{x.teacher} -> {x.student}",
        x.method if x.method == "full" else f"LoRA of rank {x.rank}",
        f"teacher {x.teacher_source}",
        x.optimizer + (" in the backward pass" if x.in_backward else ""),
        f"{x.batch} x {x.seq_len} tokens",
        "activations checkpointed" if x.checkpointing else "activations kept",
    ]
    if x.gpus > 1:
        parts.append(f"each of {x.gpus} cards" + (", weights shared (FSDP2)" if x.fsdp else ""))
    return ", ".join(parts)


def as_json(found: Estimate, gpu: str, tracked: Tracked | None, compare: bool) -> dict[str, Any]:
    """Bytes."""
    budget = budget_of(gpu)
    others = compared(found.setting) if compare else {}
    return {
        "setting": asdict(found.setting),
        "gpu": gpu,
        "budget": budget,
        "moments": [{**one._asdict(), "total": one.total} for one in found.moments],
        "peak": found.peak,
        "fits": found.peak <= budget,
        "largest_batch": largest_batch(found.setting, budget),
        "tracked": None if tracked is None else tracked._asdict(),
        "others": {name: other.peak for name, other in others.items()},
    }


def show(
    found: Estimate, gpu: str, tracked: Tracked | None, compare: bool, console: Console
) -> None:
    """Prints it."""
    budget, worst = budget_of(gpu), found.worst
    console.print(described(found.setting), highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column(f"at its worst, {worst.name}")
    table.add_column("GiB", justify="right")
    for name, said in ROWS.items():
        table.add_row(said, f"{getattr(worst, name) / GIB:.2f}")
    table.add_section()
    table.add_row("together", f"{found.peak / GIB:.2f}")
    if tracked is not None:
        table.add_row("tracked by torch", f"{tracked.peak / GIB:.2f}")
    table.add_row(f"of {gpu}, {LEFT / GIB:.0f} GiB left to CUDA", f"{budget / GIB:.2f}")
    console.print(table)
    if compare:
        show_others(found, budget, console)
    most = largest_batch(found.setting, budget)
    if found.peak <= budget:
        console.print(f"It fits, as do batches of up to {most}.", highlight=False)
        return
    said = f"a batch of {most} would" if most else "nor would a batch of 1"
    console.print(f"It does not fit; {said}. Other ways:", highlight=False)
    for change, other in remedies(found.setting):
        peak = estimate(other).peak
        if peak >= found.peak:
            continue
        fits = "fits" if peak <= budget else "does not fit"
        console.print(f"  {change}: {peak / GIB:.2f} GiB, {fits}", highlight=False)


def show_others(found: Estimate, budget: int, console: Console) -> None:
    """The same step with other libraries' losses."""
    table = Table(box=None, pad_edge=False)
    for name in ("with the loss of", "GiB", "of it the loss's", "fits", "teacher"):
        table.add_column(name, justify="right" if "G" in name or "loss's" in name else "left")
    for name, other in {"sadkern": found, **compared(found.setting)}.items():
        loss = max(moment.loss for moment in other.moments)
        fits = "yes" if other.peak <= budget else "no"
        sizes = (f"{count / GIB:.2f}" for count in (other.peak, loss))
        table.add_row(name, *sizes, fits, other.setting.teacher_source)
    console.print(table)


def remedies(x: Setting) -> Iterator[tuple[str, Setting]]:
    """What would take less, the mildest first."""
    if not x.checkpointing:
        yield "--checkpointing", replace(x, checkpointing=True)
    if x.method == "full" and not x.in_backward and x.gpus == 1:
        yield "--in-backward", replace(x, in_backward=True)
    if x.optimizer != "adamw8bit":
        yield "--optimizer adamw8bit", replace(x, optimizer="adamw8bit")
    for source in ("online-4bit", "hidden", "cached"):
        if x.teacher_source.startswith("online") and x.teacher_source != source:
            yield f"--teacher-source {source}", replace(x, teacher_source=source)
    if x.method == "full":
        yield "--method lora", replace(x, method="lora", in_backward=False)
    if not x.fsdp:
        more = max(2, x.gpus)
        yield f"--gpus {more} --fsdp", replace(x, gpus=more, fsdp=True, in_backward=False)
    kept = "cached" if x.teacher_source.startswith("online") else x.teacher_source
    least = replace(
        x, checkpointing=True, in_backward=x.method == "full" and x.gpus == 1,
        optimizer="adamw8bit", teacher_source=kept,
    )  # fmt: skip
    if least != x:
        yield "all of these but LoRA and more cards", least
