"""A student: taught in one of the ways, measured beside its teacher, and let play."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from bench.peers import gkd_collator
from bench.reproduce import material
from bench.reproduce.study import (
    CELLS,
    MAX_INVALID,
    MAX_NEW_TOKENS,
    MAX_TURNS,
    METHODS,
    PLAYED_AT_A_TIME,
    STUDENT_RATE,
    STUDENT_STEPS,
    TAUGHT_AT_A_TIME,
    Folder,
)
from sadkern.evaluate import script
from sadkern.evaluate.agent import LanguageAgent
from sadkern.evaluate.environments.alfworld import ALFWorld, games
from sadkern.evaluate.tasks import Task
from sadkern.files import write_json
from sadkern.teacher import CachedTeacher, HardLabels
from sadkern.train import SADConfig, SADTrainer


def teach(folder: Folder, name: str) -> None:
    """A cell: the student's KL to its teacher on held-out episodes, and its own episodes."""
    cell = next(cell for cell in CELLS if cell.name == name)
    ours, held_out = (material.examples_of(folder, texts) for texts in material.taught(folder))
    tokenizer = material.tokenizer_of(folder)
    student = material.load(folder.base(cell.size))
    signal = CachedTeacher(folder.signal)
    output = folder.cell(name)
    how = settings(output, cell.seed, **METHODS[cell.method][1])
    if cell.method == "peer":
        peer(student, material.load(folder.teacher), ours, tokenizer, how)
    else:
        teacher = HardLabels() if cell.method == "hard" else signal
        SADTrainer(
            model=student, teacher_model=teacher, args=SADConfig(**how), train_dataset=ours,
            processing_class=tokenizer,
        ).train()  # fmt: skip
    # By the spans and the teacher, whatever it was taught by.
    measured = SADTrainer(
        model=student, teacher_model=signal, args=SADConfig(**settings(output, 0)),
        eval_dataset=held_out, processing_class=tokenizer,
    ).evaluate()  # fmt: skip
    write_json(output / "measured.json", measured)
    student.save_pretrained(output)
    play(folder, student, output)


def settings(output: Path, seed: int, **others: Any) -> dict[str, Any]:
    """Of `transformers.TrainingArguments`, alike for every student, TRL's too."""
    return {
        "output_dir": str(output), "max_steps": STUDENT_STEPS, "learning_rate": STUDENT_RATE,
        "seed": seed,
        "per_device_train_batch_size": TAUGHT_AT_A_TIME, "warmup_steps": 20,
        "lr_scheduler_type": "linear", "weight_decay": 0.1, "adam_beta2": 0.95,
        "logging_steps": 20, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        **others,
    }  # fmt: skip


def peer(student: Any, teacher: Any, data: list[Any], tokenizer: Any, how: dict[str, Any]) -> None:
    """TRL's GKDTrainer on the same tokens, of given episodes alone and by forward KL."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    GKDTrainer(
        model=student, teacher_model=teacher, train_dataset=Dataset.from_list(data),
        args=GKDConfig(**how, lmbda=0.0, beta=0.0, temperature=1.0, bf16=False,
                       gradient_checkpointing=False),
        data_collator=gkd_collator(tokenizer.pad_token_id), processing_class=tokenizer,
    ).train()  # fmt: skip


def play(folder: Folder, model: Any, output: Path) -> None:
    """The test games, greedily."""
    agent = LanguageAgent(
        model.eval(), material.tokenizer_of(folder), max_new_tokens=MAX_NEW_TOKENS
    )
    tasks = [
        Task("alfworld", game["id"], partial(ALFWorld, game)) for game in games(folder.test_games)
    ]
    script.run(
        agent, tasks, output, batch_size=PLAYED_AT_A_TIME, max_turns=MAX_TURNS,
        max_invalid=MAX_INVALID,
    )  # fmt: skip


def play_model(folder: Folder, path: Path) -> None:
    """A model of the run, which keeps its episodes beside its weights."""
    play(folder, material.load(folder.root / path), folder.root / path)
