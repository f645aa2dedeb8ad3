"""`sadkern train`: a student, a teacher and a file of trajectories in, a distilled student out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from sadkern.train.config import SADConfig
from sadkern.train.data import load_trajectories
from sadkern.train.trainer import SADTrainer


@dataclass
class ScriptArguments:
    """What is trained on what."""

    model_name_or_path: str = field(metadata={"help": "The student: a folder or a hub's name."})
    teacher_model_name_or_path: str = field(
        metadata={"help": "The teacher, of the same tokenizer: a folder or a hub's name."}
    )
    dataset_name: str = field(
        metadata={"help": "Trajectories: a JSON Lines file, each line an object with a text."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Trajectories to evaluate on, of the same form."}
    )


def main(arguments: Sequence[str]) -> None:
    """Run with the command line's arguments; resumes from `--resume_from_checkpoint`."""
    parser = HfArgumentParser(
        (ScriptArguments, SADConfig),  # type: ignore[arg-type]
        prog="sadkern train",
        description="Distil a teacher into a student, span by span.",
    )
    script, args = parser.parse_args_into_dataclasses(list(arguments))
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    trainer = SADTrainer(
        model=AutoModelForCausalLM.from_pretrained(script.model_name_or_path),
        teacher_model=AutoModelForCausalLM.from_pretrained(script.teacher_model_name_or_path),
        args=args,
        train_dataset=load_trajectories(script.dataset_name),
        eval_dataset=load_trajectories(script.eval_dataset_name)
        if script.eval_dataset_name
        else None,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
