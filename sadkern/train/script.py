"""`sadkern train`: a student, a teacher and a file of trajectories in, a distilled student out."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments

from sadkern.data import load_trajectories, prepare
from sadkern.store.identity import MODES
from sadkern.teacher import CachedTeacher, ServedTeacher, ServerError, TeacherSource
from sadkern.teacher.load import SAMPLE, load_teacher
from sadkern.teacher.wire import WIRES
from sadkern.train.config import SADConfig
from sadkern.train.trainer import SADTrainer

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Distil a teacher into a student, span by span: on the [REASON] and [ACT] tokens of agent
trajectories the student learns the teacher's distribution of the next token.

  sadkern train --model_name_or_path Qwen/Qwen3-0.6B --teacher_model_name_or_path Qwen/Qwen3-8B \\
      --dataset_name trajectories.jsonl --output_dir runs/student

A trajectory is a line of the file, an object with its transcript as "text" (and, if you like, a
"prompt" before it, which is not trained on):

  {"text": "Goal: cool a mug\\nReasoning: A fridge cools things.\\nAction: open fridge\\n..."}
  {"text": "Thought 1: Who wrote it?\\nAction 1: Search[Emma]\\nObservation 1: ..."}
"""
EPILOG = """\
Logged beside the loss: reason/kl and act/kl, the divergence of each span in nats per token;
reason/tokens and act/tokens; reason/agreement and act/agreement, the share of tokens on which both
models' first choice is the same; teacher_entropy. With --eval_dataset_name the same as
eval_reason/kl and so on, at the end and as often as --eval_strategy says.

The student, its tokenizer and trainer_state.json (all that was logged) are left in --output_dir.
After an interruption the same command with --resume_from_checkpoint last goes on.

The teacher need not be there: `sadkern cache` keeps what it says on disk, and --teacher_cache reads
it; or it is behind vLLM or SGLang, --teacher_server.

Memory: a smaller --per_device_train_batch_size with more --gradient_accumulation_steps gives the
same gradient; --gradient_checkpointing and --bf16 save more. Several devices: start it with
`accelerate launch -m sadkern.cli train ..`.

Every other option of transformers.TrainingArguments is understood too.
"""
# Of the options of TrainingArguments those that help shows: all of them fill ten screens.
SHOWN = (
    "output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate "
    "lr_scheduler_type warmup_steps gradient_accumulation_steps bf16 gradient_checkpointing "
    "save_steps eval_strategy eval_steps report_to seed use_cpu"
).split()


@dataclass
class ScriptArguments:
    """What is trained on what."""

    model_name_or_path: str = field(metadata={"help": "The student: a folder or a hub's name."})
    dataset_name: str = field(
        metadata={"help": "Trajectories: a JSON Lines file, each line an object with a text."}
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The teacher, of the same tokenizer: a folder or a hub's name."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "What `sadkern cache` made: no teacher is loaded. With a teacher or a server "
            "beside it, what it lacks is asked of that and kept: the first epoch writes, later "
            "ones read."
        },
    )
    teacher_server: str | None = field(
        default=None,
        metadata={"help": "A teacher's address, such as http://localhost:8000; with its cache."},
    )
    teacher_server_kind: str = field(
        default="vllm", metadata={"help": f"One of {', '.join(WIRES)}."}
    )
    teacher_k: int = field(
        default=64, metadata={"help": "Tokens that a new cache keeps of a row, or that are asked."}
    )
    teacher_mode: str = field(
        default="topk", metadata={"help": f"Of a new cache: one of {', '.join(MODES)}."}
    )
    teacher_device: str | None = field(
        default=None,
        metadata={
            "help": "Where the teacher runs: cpu, cuda:1, ..; offload: its weights stay in the "
            "host's memory. Default: on the student's device."
        },
    )
    teacher_quantization: str | None = field(
        default=None,
        metadata={"help": "8bit or 4bit; its KL to the whole teacher is measured and told."},
    )
    teacher_batch_size: int | None = field(
        default=None,
        metadata={"help": "Trajectories that the teacher runs at a time; default: the batch."},
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Trajectories to evaluate on, of the same form."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of the student's weights. In bfloat16 small updates are lost to rounding; "
            "'auto' is what they are saved in, as the teacher's always are."
        },
    )


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def main(arguments: Sequence[str]) -> None:
    """Run with the command line's arguments."""
    parser = _parser()
    try:
        script, args = parser.parse_args_into_dataclasses(list(arguments))
        if not (script.teacher_model_name_or_path or script.teacher_cache or script.teacher_server):
            raise ValueError(
                "no teacher: expected --teacher_model_name_or_path, --teacher_cache or "
                "--teacher_server"
            )
        # Before the models, which take longer to load and have less to be wrong.
        train_dataset = load_trajectories(script.dataset_name)
        held_out = script.eval_dataset_name
        eval_dataset = load_trajectories(held_out) if held_out else None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        if script.teacher_model_name_or_path:
            _check_tokenizers(
                tokenizer, script.model_name_or_path, script.teacher_model_name_or_path
            )
        trainer = SADTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                script.model_name_or_path, dtype=script.dtype
            ),
            teacher_model=_teacher(script, args, tokenizer, train_dataset),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
        )
    except (ValueError, LookupError, ServerError) as error:
        parser.error(str(error))
    checkpoint = args.resume_from_checkpoint
    trainer.train(
        resume_from_checkpoint=last_checkpoint(args.output_dir)
        if checkpoint == "last"
        else checkpoint
    )
    if eval_dataset:
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    # Several processes: left to the interpreter's exit, the threads between them may abort it, and
    # those of a wrapped model are there as long as that is.
    accelerator = trainer.accelerator
    del trainer
    accelerator.free_memory()
    accelerator.end_training()


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end; None: there is none."""
    # The state is what the Trainer writes last: a folder without it was interrupted.
    whole = [state.parent for state in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[1]))) if whole else None


def _parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        (ScriptArguments, SADConfig),  # type: ignore[arg-type]
        prog="sadkern train",
        usage="%(prog)s --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER "
        "--dataset_name FILE --output_dir DIR [option ..]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Help,
    )
    ours = {f.name for f in fields(SADConfig) if f.name in SADConfig.__annotations__}
    hidden = {f.name for f in fields(TrainingArguments)} - ours - set(SHOWN)
    for action in parser._actions:
        if action.dest in hidden or action.dest == "remove_unused_columns":
            action.help = argparse.SUPPRESS
    return parser


def _teacher(
    script: ScriptArguments, args: SADConfig, tokenizer: Any, records: Sequence[Any]
) -> TeacherSource:
    """What the command line says of the teacher. ValueError: that is none."""
    source: Any = None
    if script.teacher_server:
        source = ServedTeacher(
            script.teacher_server, kind=script.teacher_server_kind, k=script.teacher_k,
            tokenizer=tokenizer, model=script.teacher_model_name_or_path,
        )  # fmt: skip
    elif script.teacher_model_name_or_path:
        offload = script.teacher_device == "offload"
        device = args.device if offload else script.teacher_device or args.device
        sample = None
        if script.teacher_quantization:
            sample = prepare(records[:SAMPLE], tokenizer, **args.reading())
        source = load_teacher(
            script.teacher_model_name_or_path, device=device, offload=offload,
            quantization=script.teacher_quantization, sample=sample or (),
            batch_size=script.teacher_batch_size,
        )  # fmt: skip
    if script.teacher_cache:
        return CachedTeacher(
            script.teacher_cache, source, tokenizer=tokenizer, mode=script.teacher_mode,
            k=script.teacher_k, temperature=args.temperature,
        )  # fmt: skip
    return source


def _check_tokenizers(tokenizer: Any, student: str, name: str) -> None:
    """Refuses a teacher to whom the student's token ids mean something else."""
    try:
        teacher = AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError):
        logger.warning("%s has no tokenizer: it is taken to have the student's", name)
        return
    theirs = teacher.get_vocab()
    # What was added on top (padding, roles, tools) may differ between relatives.
    added = {**tokenizer.get_added_vocab(), **teacher.get_added_vocab()}
    for token, number in tokenizer.get_vocab().items():
        if token not in added and theirs.get(token, number) != number:
            raise ValueError(
                f"token {token!r} is {number} to {student} and {theirs[token]} "
                f"to {name}: expected a teacher with the student's tokenizer"
            )
