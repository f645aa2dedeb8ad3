"""`sadkern train`: a student, a teacher and a file of trajectories in, a distilled student out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sadkern.data import load_trajectories, prepare
from sadkern.store import DamagedError, IdentityError
from sadkern.teacher import (
    CachedTeacher,
    HardLabels,
    MissingError,
    ServedTeacher,
    ServerError,
    TeacherSource,
)
from sadkern.teacher.load import SAMPLE, load_teacher
from sadkern.teacher.named import device_named, dtype_named, model_named
from sadkern.train.arguments import ScriptArguments, parse
from sadkern.train.config import SADConfig
from sadkern.train.preview import print_plan
from sadkern.train.setup import peft
from sadkern.train.trainer import SADTrainer

logger = logging.getLogger(__name__)
K = 64  # tokens of a row, where nobody says
STATE = "trainer_state.json"
# What ends a run without a fault of the program: a line says it.
FROM_OUTSIDE = (ServerError, DamagedError, IdentityError, MissingError, FloatingPointError, OSError)


def main(arguments: Sequence[str]) -> None:
    """Run with the command line's arguments."""
    script, args, parser = parse(arguments)
    try:
        # Before the models, which take longer to load and have less to be wrong.
        train_dataset = load_trajectories(script.dataset_name)
        held_out = script.eval_dataset_name
        eval_dataset = load_trajectories(held_out) if held_out else None
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        checkpoint = _checkpoint(args)
        dtype_named(script.dtype)
        tokenizer = AutoTokenizer.from_pretrained(model_named(script.model_name_or_path))
        if script.teacher_model_name_or_path:
            _check_tokenizers(
                tokenizer, script.model_name_or_path, script.teacher_model_name_or_path
            )
        if script.dry_run:
            print_plan(script, args, tokenizer, train_dataset)
            return
        trainer = SADTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                script.model_name_or_path, dtype=script.dtype
            ),
            teacher_model=_teacher(script, args, tokenizer, train_dataset),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=_lora(script),
        )
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        parser.error(str(error))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except FROM_OUTSIDE as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    if trainer.stop.received is not None:
        logger.warning("the same command with --resume_from_checkpoint last goes on")
        raise SystemExit(128 + trainer.stop.received)
    if eval_dataset:
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"the student is in {args.output_dir}, after {trainer.state.global_step} steps")
    # Several processes: left to the interpreter's exit, the threads between them may abort it, and
    # those of a wrapped model are there as long as that is.
    accelerator = trainer.accelerator
    del trainer
    accelerator.free_memory()
    accelerator.end_training()


def _checkpoint(args: SADConfig) -> str | None:
    """What is gone on from. ValueError: it is not there."""
    named = args.resume_from_checkpoint
    if named == "last":
        return last_checkpoint(str(args.output_dir))
    if named is not None and not (Path(named) / STATE).is_file():
        newest = last_checkpoint(str(args.output_dir))
        raise ValueError(
            f"--resume_from_checkpoint {named}: there is no checkpoint; {args.output_dir} has "
            + (f"{newest}" if newest else "none")
        )
    return named


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end; None: there is none."""
    # The state is what the Trainer writes last: a folder without it was interrupted.
    whole = [state.parent for state in Path(output_dir).glob(f"checkpoint-*/{STATE}")]
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[1]))) if whole else None


def _teacher(
    script: ScriptArguments, args: SADConfig, tokenizer: Any, records: Sequence[Any]
) -> TeacherSource:
    """What the command line says of the teacher. ValueError: that is none."""
    source: Any = None
    if script.hard_labels:
        return HardLabels()
    if script.teacher_server:
        source = ServedTeacher(
            script.teacher_server, kind=script.teacher_server_kind, k=script.teacher_k or K,
            tokenizer=tokenizer, model=script.teacher_model_name_or_path,
        )  # fmt: skip
    elif script.teacher_model_name_or_path:
        offload = script.teacher_device == "offload"
        # One that ranks are to share is whole in the host's memory alone.
        shared = args.fsdp and not offload and not script.teacher_quantization
        here = "cpu" if shared else args.device
        device = here if offload else device_named(script.teacher_device or str(here))
        sample = None
        if script.teacher_quantization:
            sample = prepare(records[:SAMPLE], tokenizer, **args.reading())
        source = load_teacher(
            script.teacher_model_name_or_path, device=device, offload=offload,
            quantization=script.teacher_quantization, sample=sample or (),
            batch_size=script.teacher_batch_size,
        )  # fmt: skip
    if script.teacher_cache:
        cache = CachedTeacher(
            script.teacher_cache, source, tokenizer=tokenizer, mode=script.teacher_mode,
            k=script.teacher_k or K, temperature=args.temperature,
        )  # fmt: skip
        held = cache.store.identity.k
        if script.teacher_k is not None and held not in (None, script.teacher_k):
            raise ValueError(
                f"{script.teacher_cache} has {held} tokens of a row, not --teacher_k "
                f"{script.teacher_k}: expected --teacher_k {held}, or another cache"
            )
        return cache
    return source


def _lora(script: ScriptArguments) -> Any:
    """A `peft.LoraConfig`, if one is asked for. ValueError: as of `peft`."""
    if not script.use_peft:
        return None
    targets = script.lora_target_modules
    return peft().LoraConfig(
        task_type="CAUSAL_LM", r=script.lora_r, lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout, modules_to_save=script.lora_modules_to_save,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )  # fmt: skip


def _check_tokenizers(tokenizer: Any, student: str, name: str) -> None:
    """Refuses a teacher to whom the student's token ids mean something else."""
    name = model_named(name)
    try:
        teacher = AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError):
        AutoConfig.from_pretrained(name)  # whose error, if there is no model either, says more
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
