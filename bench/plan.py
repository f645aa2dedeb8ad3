"""Planned memory beside tracked, at full size and without a GPU: `python -m bench.plan`.

Ways to distil 13B into 7B on cards of 48 GB. Each step is worked out (`sadkern plan`) and then run
on tensors without contents under torch's own memory tracker, FSDP2's where cards share the models;
some of the long ones also with whole logits and with the losses of TRL and Liger in place of
sadkern's, all else alike. Some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.common import table, versions
from bench.figures.tables import plan
from bench.peers import step_of
from sadkern.plan import Setting, estimate
from sadkern.plan.estimate import compared
from sadkern.plan.track import tracked

RESULTS = Path(__file__).parent / "results" / "plan.json"
LORA: dict[str, Any] = {"method": "lora", "optimizer": "adamw", "in_backward": False}
SHARED: dict[str, Any] = {"teacher_source": "online", "fsdp": True, "in_backward": False}
WAYS: dict[str, dict[str, Any]] = {
    "full fine-tuning, cached teacher": {"teacher_source": "cached"},
    "full fine-tuning, teacher in 4 bits beside it": {"teacher_source": "online-4bit"},
    "LoRA, bf16 teacher beside it": {**LORA, "teacher_source": "online"},
    "LoRA, teacher in 4 bits beside it": {**LORA, "teacher_source": "online-4bit"},
    "full fine-tuning, bf16 teacher, 2 cards": {**SHARED, "gpus": 2},
    "full fine-tuning, bf16 teacher, 4 cards": {**SHARED, "gpus": 4},
}
STEPS = [(way, length, 8) for way in WAYS for length in (512, 2048)]
STEPS += [  # as the recipes have it
    ("LoRA, bf16 teacher beside it", 2048, 4),
    ("LoRA, teacher in 4 bits beside it", 512, 32),
    ("LoRA, teacher in 4 bits beside it", 2048, 16),
]
COMPARED = list(WAYS)[:3]


def rows(student: str, teacher: str, progress: Progress) -> list[dict[str, Any]]:
    found = []
    task = progress.add_task("tracking", total=len(STEPS))
    for way, length, batch in sorted(STEPS, key=lambda step: list(WAYS).index(step[0])):
        setting = Setting(
            student=student, teacher=teacher, seq_len=length, batch=batch, **WAYS[way]
        )  # fmt: skip
        row: dict[str, Any] = {"way": way, "seq_len": length, "batch": batch}
        row["planned"] = estimate(setting).peak
        row["tracked"] = tracked(setting).peak
        if way in COMPARED and (length, batch) == (2048, 8):
            row["others"] = {}
            for name, other in compared(setting).items():
                step = tracked(other.setting, step=step_of(name))
                row["others"][name] = {"planned": other.peak, "tracked": step.peak}
        found.append(row)
        progress.advance(task)
    return found


def markdown(found: Sequence[dict[str, Any]]) -> str:
    head, *lines = plan(found)
    return "\n".join(table(head, lines)) + "\n"


def off(row: dict[str, Any]) -> bool:
    """Whether a plan is not within 5 % of what was tracked."""
    pairs = [row, *row.get("others", {}).values()]
    return any(abs(pair["planned"] / pair["tracked"] - 1) > 0.05 for pair in pairs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    for side, name in (("student", "llama-7b"), ("teacher", "llama-13b")):
        said = f"as of `sadkern plan` (default: {name})"
        parser.add_argument(f"--{side}", default=name, help=said)
    parser.add_argument("--write", action="store_true", help=f"the numbers into {RESULTS.name}")
    options = parser.parse_args(arguments)
    try:
        estimate(Setting(student=options.student, teacher=options.teacher))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with Progress(console=Console(stderr=True)) as progress:
        found = rows(options.student, options.teacher, progress)
    if options.write:
        known = versions(("torch", "transformers", "trl", "liger-kernel", "torchao"))
        RESULTS.write_text(json.dumps({"versions": known, "rows": found}, indent=1) + "\n")
    print(markdown(found), end="")
    return int(any(off(row) for row in found))


if __name__ == "__main__":
    sys.exit(main())
