"""What does a step of training cost, beside a loop by hand and beside TRL's GKDTrainer?

    pytest bench/bench_train.py --benchmark-enable --record

The same two models, trajectories, optimizer and batches for all; 30 % of the tokens are supervised,
as one span, so that all have the same loss, which is checked first. The loop by hand is what one
writes with the same modules and no trainer: collate, teacher, loss, clip, step. A step is timed
from the end of one to the end of the next, within a run; every round has a run of each.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, get_scheduler

from bench.peers import gkd_collator
from sadkern import span_kl
from sadkern.data import SpanCollator, inputs_of
from sadkern.forward import head_projection, supervised_loss
from sadkern.teacher import OnlineTeacher
from sadkern.train import SADConfig, SADTrainer

V, TOKENS, BATCH, SUPERVISED = 32000, 256, 8, 0.3
ROUNDS, STEPS, SKIPPED = 8, 8, 2


def model(hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=TOKENS, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trajectories(count: int) -> list[dict[str, Any]]:
    """Of one length, spans of 16 tokens of which 30 % are supervised."""
    rng = random.Random(0)
    made = []
    for _ in range(count):
        runs = [int(i % 10 < 10 * SUPERVISED) for i in range(TOKENS // 16)]
        rng.shuffle(runs)
        spans = [run for run in runs for _ in range(16)]
        spans[-1] = 0
        made.append({"input_ids": [rng.randrange(V) for _ in spans], "span_ids": spans})
    return made


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH, "max_steps": STEPS,
        "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0,
        "logging_steps": STEPS, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "train_sampling_strategy": "sequential",
    }  # fmt: skip


def ours(folder: Path, student: Any, teacher: Any, data: list[Any]) -> tuple[float, list[float]]:
    """The first loss, and when each step ended."""
    clock = Clock()
    trainer = SADTrainer(
        model=student, teacher_model=teacher, train_dataset=data, callbacks=[clock],
        args=SADConfig(**settings(folder), segmentation="flat"),
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history[0]["loss"], clock.ends


def by_hand(folder: Path, student: Any, teacher: Any, data: list[Any]) -> tuple[float, list[float]]:
    source, projection = OnlineTeacher(teacher), head_projection(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    schedule = get_scheduler("cosine", optimizer, 0, STEPS)
    collate, ends, losses = SpanCollator(0), [], []
    student.train()
    for begin in range(0, STEPS * BATCH, BATCH):
        batch = collate(data[begin : begin + BATCH])
        signal = source(batch["rows"], **inputs_of(batch))
        kinds = batch["span_ids"].flatten()[batch["rows"]]

        def loss_of(own: Any, signal: Any = signal, kinds: Any = kinds) -> Any:
            return span_kl(own, signal, kinds, reduction="token_mean").loss

        loss = supervised_loss(student, batch["rows"], loss_of, projection, **inputs_of(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        ends.append(time.perf_counter())
    return statistics.mean(losses), ends


def trl(folder: Path, student: Any, teacher: Any, data: list[Any]) -> tuple[float, list[float]]:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    clock = Clock()
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, train_dataset=Dataset.from_list(data),
        args=GKDConfig(**settings(folder), lmbda=0.0, beta=0.0, bf16=False,
                       gradient_checkpointing=False),
        data_collator=gkd_collator(0), processing_class=tokenizer(), callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history[0]["loss"], clock.ends


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def test_a_step_of_training(tmp_path: Path, benchmark: Any) -> None:
    benchmark.group = (
        f"a step of {BATCH} x {TOKENS} tokens, {SUPERVISED:.0%} supervised, V={V}, student 256 x 2 "
        "layers, teacher 384 x 3 layers, fp32"
    )
    contestants = {"loop by hand": by_hand}
    try:
        import trl as _  # noqa: F401

        contestants["TRL GKDTrainer"] = trl
    except ImportError:
        benchmark.extra_info["absent"] = "trl"
    data = trajectories(STEPS * BATCH)
    student, teacher = model(256, 2, 0), model(384, 3, 1)
    steps: dict[str, list[float]] = {name: [] for name in ("SADTrainer", *contestants)}
    losses: dict[str, float] = {}
    for _round in range(ROUNDS if benchmark.enabled else 1):
        for name, run in {"SADTrainer": ours, **contestants}.items():
            losses[name], ends = run(tmp_path, copy.deepcopy(student), copy.deepcopy(teacher), data)
            steps[name] += [
                b - a for a, b in zip(ends[SKIPPED - 1 :], ends[SKIPPED:], strict=False)
            ]
        for name, loss in losses.items():
            assert loss == pytest.approx(losses["SADTrainer"], rel=1e-4), name
    benchmark.pedantic(lambda: None, rounds=1)
    median = {name: statistics.median(each) for name, each in steps.items()}
    benchmark.extra_info["rows"] = [
        {
            "contestant": name,
            "a step in SADTrainer's": seconds / median["SADTrainer"],
            "ms": 1000 * seconds,
        }
        for name, seconds in median.items()
    ]
