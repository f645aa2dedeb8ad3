"""Planned memory beside tracked, at full size and without a GPU: `python -m bench.plan`.

Three ways to distil 13B into 7B on one card of 48 GB. Each step is worked out (`sadkern plan`) and
then run on tensors without contents under torch's own memory tracker; at the longer sequences also
with whole logits of both models in place of sadkern's loss, all else alike: of a cached teacher as
one would write it in PyTorch, else by TRL's own function for GKD. Two minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bench.common import versions
from sadkern.plan import Setting, estimate
from sadkern.plan.track import finish_step, tracked

RESULTS = Path(__file__).parent / "results" / "plan.json"
GIB = 1 << 30
LENGTHS = (512, 2048)
WAYS = {
    "full fine-tuning, cached teacher": {"source": "cached"},
    "full fine-tuning, teacher in 4 bits beside it": {"source": "online-4bit"},
    "LoRA, bf16 teacher beside it": {
        "method": "lora", "source": "online", "optimizer": "adamw", "in_backward": False,
    },
}  # fmt: skip


def eager_step(made: Any, model: Any, batch: dict[str, Tensor]) -> None:
    """With logits of all tokens, as TRL's GKD trainer has them; of a cached teacher, top-k KL."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    teacher = getattr(made.teacher, "model", None)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if teacher is None:
        likely = made.teacher(torch.zeros(ids.numel(), dtype=torch.int64))
        known = logits.flatten(0, 1).float().log_softmax(-1).gather(-1, likely.ids.long())
        loss = -(likely.logprobs.exp() * known).sum(-1).mean()
    else:
        from trl.experimental.gkd import GKDTrainer

        with torch.no_grad():
            theirs = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = GKDTrainer.generalized_jsd_loss(logits, theirs, beta=0.5)
    loss.backward()
    finish_step(made, model)


def rows(student: str, teacher: str, progress: Progress) -> list[dict[str, Any]]:
    found = []
    task = progress.add_task("tracking", total=len(WAYS) * (len(LENGTHS) + 1))
    for name, options in WAYS.items():
        for length in LENGTHS:
            setting = Setting(student=student, teacher=teacher, seq_len=length, **options)  # type: ignore[arg-type]
            row = {"way": name, "seq_len": length, "batch": setting.batch}
            row["planned"] = estimate(setting).peak
            row["tracked"] = tracked(setting).peak
            progress.advance(task)
            if length == max(LENGTHS):
                row["eager"] = tracked(setting, step=eager_step).peak
                progress.advance(task)
            found.append(row)
    return found


def markdown(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| 13B -> 7B, 8 sequences a step | tokens | planned | tracked | whole logits, tracked |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        eager = f"{row['eager'] / GIB:.1f}" if "eager" in row else ""
        lines.append(
            f"| {row['way']} | {row['seq_len']} | {row['planned'] / GIB:.1f} | "
            f"{row['tracked'] / GIB:.1f} | {eager} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__)
    parser.add_argument("--student", default="llama-7b")
    parser.add_argument("--teacher", default="llama-13b")
    parser.add_argument("--write", action="store_true", help=f"the numbers into {RESULTS.name}")
    options = parser.parse_args(arguments)
    with Progress(console=Console(stderr=True)) as progress:
        found = rows(options.student, options.teacher, progress)
    if options.write:
        known = versions(("torch", "transformers", "trl", "torchao"))
        RESULTS.write_text(json.dumps({"versions": known, "rows": found}, indent=1) + "\n")
    print(markdown(found), end="")
    return int(any(abs(row["planned"] / row["tracked"] - 1) > 0.05 for row in found))


if __name__ == "__main__":
    sys.exit(main())
