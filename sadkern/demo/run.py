"""The main job at the smallest size at which it is still real.

Trajectories of a scripted world -> a tokenizer -> a small teacher trained on them -> a smaller
student distilled from the teacher -> both compared on trajectories that neither has seen.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sadkern.demo.hardware import hardware
from sadkern.evaluate import Comparison, compare
from sadkern.train import SADConfig, SADTrainer, load_trajectories, prepare
from sadkern.train.progress import RichProgress

END = "<|endoftext|>"
HELD_OUT = 7  # one trajectory in so many; the three environments take turns, so no multiple of 3
TEACHER = {"width": 192, "layers": 3}
STUDENT = {"width": 96, "layers": 2}
TEACHER_EPOCHS, STUDENT_EPOCHS = 8, 10


def main(output_dir: Path, seed: int) -> dict[str, Any]:
    """Run it, print the table, and leave models, `demo.json` and `demo.png` in `output_dir`."""
    start = time.perf_counter()
    console = Console()
    set_seed(seed)

    shipped = resources.files("sadkern.demo") / "trajectories.jsonl"
    with resources.as_file(shipped) as path:
        records = load_trajectories(path)
    held_out = records[::HELD_OUT]
    training = [record for i, record in enumerate(records) if i % HELD_OUT]
    tokenizer = train_tokenizer([record["text"] for record in training])
    train_set, test_set = (prepare(part, tokenizer) for part in (training, held_out))
    tokens = sum(len(example["input_ids"]) for example in train_set)
    console.print(
        f"{len(train_set)} trajectories to learn from ({tokens} tokens, vocabulary "
        f"{len(tokenizer)}), {len(test_set)} held out"
    )

    teacher = small_model(tokenizer, **TEACHER)
    console.print(f"[bold]1/3[/] a teacher of {millions(teacher)} learns the trajectories")
    train_teacher(teacher, train_set, tokenizer, output_dir / "teacher", seed)

    student = small_model(tokenizer, **STUDENT)
    before = compare(student, teacher, test_set)
    console.print(f"[bold]2/3[/] a student of {millions(student)} is distilled from it")
    trainer = SADTrainer(
        model=student,
        teacher_model=teacher,
        args=SADConfig(
            output_dir=str(output_dir / "student"),
            num_train_epochs=STUDENT_EPOCHS,
            per_device_train_batch_size=8,
            learning_rate=4e-3,
            warmup_steps=20,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=seed,
        ),
        train_dataset=train_set,
        processing_class=tokenizer,
    )
    run(trainer)
    console.print("[bold]3/3[/] both go through the held-out trajectories")
    after = compare(student, teacher, test_set)

    figures = {
        "seed": seed,
        "hardware": hardware(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "before": asdict(before),
        "after": asdict(after),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    (output_dir / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    picture(trainer.state.log_history, output_dir / "demo.png")
    console.print(table(before, after))
    console.print(
        f"{figures['seconds']} s, peak memory {figures['peak_memory_mb']} MB; "
        f"models, demo.json and demo.png are in {output_dir}"
    )
    return figures


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=2048, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END, model_max_length=1024
    )


def small_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 48,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_teacher(
    teacher: LlamaForCausalLM,
    examples: list[dict[str, list[int]]],
    tokenizer: PreTrainedTokenizerFast,
    output_dir: Path,
    seed: int,
) -> None:
    """Next-token prediction on whole trajectories, as any language model is made."""

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        padded = tokenizer.pad(
            [{"input_ids": example["input_ids"]} for example in batch], return_tensors="pt"
        )
        labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
        return {**padded, "labels": labels}

    trainer = Trainer(
        model=teacher,
        args=TrainingArguments(
            output_dir=str(output_dir),
            num_train_epochs=TEACHER_EPOCHS,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            warmup_steps=20,
            lr_scheduler_type="cosine",
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
            seed=seed,
        ),
        train_dataset=examples,
        data_collator=collate,
        processing_class=tokenizer,
    )
    run(trainer)


def run(trainer: Trainer) -> None:
    """Train and save, under a bar."""
    for callback in (ProgressCallback, PrinterCallback, RichProgress):
        trainer.remove_callback(callback)
    trainer.add_callback(RichProgress())
    trainer.train()
    trainer.save_model()


def millions(model: LlamaForCausalLM) -> str:
    return f"{model.num_parameters() / 1e6:.2f}M parameters"


def table(before: Comparison, after: Comparison) -> Table:
    out = Table(title="The student on held-out trajectories")
    out.add_column("")
    for column in ("before", "after", "teacher"):
        out.add_column(column, justify="right")
    for title, name, form, teachers in (
        ("KL to the teacher, \\[REASON]  (nats / token)", "reason_kl", "{:.3f}", 0.0),
        ("KL to the teacher, \\[ACT]  (nats / token)", "act_kl", "{:.3f}", 0.0),
        ("CoT match with the teacher", "cot_match", "{:.1%}", 1.0),
        ("action accuracy", "action_accuracy", "{:.1%}", after.teacher_action_accuracy),
    ):
        figures = (getattr(before, name), getattr(after, name), teachers)
        out.add_row(title, *map(form.format, figures))
    return out


def picture(history: list[dict[str, float]], path: Path) -> None:
    """KL of both spans over the steps of the distillation."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    logged = [entry for entry in history if "reason/kl" in entry]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for span, colour in (("reason", "tab:blue"), ("act", "tab:red")):
        steps, values = zip(
            *((entry["step"], entry[f"{span}/kl"]) for entry in logged), strict=True
        )
        axes.plot(steps, values, color=colour, label=f"[{span.upper()}]")
    axes.set(xlabel="step", ylabel="KL(teacher || student), nats / token", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
