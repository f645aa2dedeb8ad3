"""A real training step with random weights, and its peak of memory beside the plan's.

    python -m bench.step                          LLaMA 7B, 8 x 512 tokens, on this machine's GPU
    python -m bench.step --layers 4 --device cpu

On a GPU that is what torch's allocator has handed out at most, on the CPU the growth of the
resident set, in which malloc's habits count too.
"""

from __future__ import annotations

import argparse
import json
import sys

import psutil
import torch
from torch import nn

from bench.common import hardware, versions
from bench.memory import extra_memory
from sadkern.plan import Setting, estimate
from sadkern.plan.models import MODELS, config_of, empty_model, shallow
from sadkern.plan.setting import OPTIMIZERS
from sadkern.plan.track import batch_of, trainer_of, training_step
from sadkern.teacher.named import device_named


def run(setting: Setting, device: torch.device, steps: int) -> None:
    """Everything from the model on."""
    with torch.device(device):
        student = _random(empty_model(config_of(setting.student)))
        made = trainer_of(setting, student, use_cpu=device.type == "cpu")
        if made.model is not None:
            made.create_optimizer()
        for _ in range(steps):
            training_step(made, made.model, batch_of(setting))  # type: ignore[arg-type]


def measured(setting: Setting, device: torch.device, steps: int = 2) -> int:
    """Bytes at the worst moment, beside what was there before."""
    if device.type != "cuda":
        return extra_memory(lambda: run(setting, device, steps))
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run(setting, device, steps)
    return torch.cuda.max_memory_allocated(device) - before


def _random(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02) if weight.ndim > 1 else weight.fill_(1)
    return model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument(
        "--student", default="llama-7b", help="as of `sadkern plan` (default: llama-7b)"
    )
    parser.add_argument("--layers", type=int, help="in place of the model's own")
    parser.add_argument("--batch", type=int, default=8, help="trajectories (default: 8)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of each (default: 512)")
    parser.add_argument(
        "--optimizer", default="adamw8bit", choices=OPTIMIZERS, help="(default: adamw8bit)"
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    name = options.student
    try:
        if options.layers:
            name = f"{name}, {options.layers} layers"
            MODELS[name] = shallow(config_of(options.student), options.layers)
        setting = Setting(
            student=name, batch=options.batch, seq_len=options.seq_len,
            optimizer=options.optimizer, checkpointing=not options.no_checkpointing,
        )  # fmt: skip
        device = device_named(options.device)
        planned = estimate(setting, device.type).peak
    except (ValueError, OSError) as error:
        parser.error(str(error))
    # What is loaded or made at a first step is no step's memory.
    MODELS["small"] = shallow(config_of("gpt2-120m"), 1)
    warm = Setting(student="small", batch=1, seq_len=8, optimizer=options.optimizer)
    measured(warm, device)
    peak = measured(setting, device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else hardware()
    said = {
        "student": name,
        "batch": [options.batch, options.seq_len],
        "planned": planned,
        "measured": peak,
        "ratio": peak / planned,
        "memory_before": psutil.Process().memory_info().rss,
        "on": where,
        "versions": versions(("torch", "transformers", "torchao")),
    }
    print(json.dumps(said, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
