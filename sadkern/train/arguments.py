"""The command line of `sadkern train`, and the YAML files that stand for one."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from sadkern.store.identity import MODES
from sadkern.teacher.named import suggestion
from sadkern.teacher.wire import WIRES
from sadkern.train.config import SADConfig

PROG = "sadkern train"
USAGE = """\
%(prog)s --model_name_or_path STUDENT --dataset_name FILE
           --teacher_model_name_or_path TEACHER --output_dir DIR [option ..]"""
DESCRIPTION = """\
Distil a teacher into a student, span by span: on the [REASON] and [ACT] tokens
of agent trajectories the student learns the teacher's distribution of the next
token.

  sadkern train --model_name_or_path Qwen/Qwen3-0.6B \\
      --teacher_model_name_or_path Qwen/Qwen3-8B \\
      --dataset_name trajectories.jsonl --output_dir runs/student

A trajectory is a line of the file, an object with its transcript as "text"
(and, if you like, a "prompt" before it, which is not trained on):

  {"text": "Goal: cool a mug\\nReasoning: A fridge cools.\\nAction: open fridge"}
  {"text": "Thought 1: Who wrote it?\\nAction 1: Search[Emma]\\nObservation: .."}
"""
EPILOG = """\
Logged beside the loss: reason/kl and act/kl, the divergence of each span in
nats per token; reason/agreement and act/agreement, the share of tokens on
which both models' first choice is the same; the teacher's entropy, tokens,
tokens_per_second, peak_memory_gb and more. With --eval_dataset_name the same
as eval_reason/kl and so on, at the end and as often as --eval_strategy says.

The student, its tokenizer and trainer_state.json (all that was logged) are
left in --output_dir. Ctrl-C saves the step it is at; the same command with
--resume_from_checkpoint last goes on.

Settings may stand in a YAML file: --config run.yaml. --dry_run says what would
be done.

The teacher need not be there: `sadkern cache` keeps what it says on disk, and
--teacher_cache reads it; or it is behind vLLM or SGLang, --teacher_server.

Memory: a smaller --per_device_train_batch_size with more
--gradient_accumulation_steps gives the same gradient; --gradient_checkpointing
and --bf16 save more. Several devices: `torchrun --nproc-per-node 4 -m
sadkern.cli train`.

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
    teacher_k: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a row that a new cache keeps, or that a server is asked for: 64 if "
            "not said. A cache with another number is refused."
        },
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
    hard_labels: bool = field(
        default=False,
        metadata={
            "help": "For comparison: no teacher, the cross-entropy to each trajectory's own tokens."
        },
    )
    use_peft: bool = field(
        default=False, metadata={"help": "Train a LoRA adapter in place of the weights."}
    )
    lora_r: int = field(default=16, metadata={"help": "The adapter's rank."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's scale, times its rank."})
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout of what goes into the adapter."}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of layers that get an adapter; all-linear: all but the head."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Names of layers that are trained whole beside the adapter."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Say what would be done, and stop before it is."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of the student's weights. In bfloat16 small updates are lost to rounding; "
            "'auto' is what they are saved in, as the teacher's always are."
        },
    )


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """As wide as the terminal, 100 at most; a default of None says nothing."""

    def __init__(self, prog: str):
        width = min(100, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=width // 3, width=width)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default is not None else action.help


def expanded(arguments: Sequence[str], known: Collection[str]) -> list[str]:
    """`arguments` with each `--config FILE` replaced by what the YAML file says, put first, so that
    what is written on the command line takes its place. ValueError: it is no mapping of settings,
    or of one that is not among the `known`.
    """
    own = argparse.ArgumentParser(PROG, USAGE, add_help=False, allow_abbrev=False)
    own.add_argument("--config", action="append", default=[], metavar="FILE")
    found, rest = own.parse_known_args(list(arguments))
    return [word for file in found.config for word in _words(Path(file), known)] + rest


def _setting(option: str) -> str:
    """Its name, in one of its spellings."""
    return option.lstrip("-").replace("-", "_")


def _words(file: Path, known: Collection[str]) -> list[str]:
    try:
        settings = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds a {type(settings).__name__}: expected names and values")
    words: list[str] = []
    for name, value in settings.items():
        if _setting(str(name)) not in known:
            near = suggestion(_setting(str(name)), known)
            raise ValueError(f"{file}: there is no setting {name!r}{near}")
        if value is not None:
            # (`fsdp` takes no True behind it, and no switch needs one.)
            values = value if isinstance(value, list) else [] if value is True else [value]
            told = [json.dumps(x) if isinstance(x, dict) else str(x) for x in values]
            words += [f"--{name}", *told]
    return words


def parse(arguments: Sequence[str]) -> tuple[ScriptArguments, SADConfig, HfArgumentParser]:
    """The settings, and the parser, which tells errors. It exits where they are not understood."""
    parser = _parser()
    known = {_setting(option) for option in parser._option_string_actions}
    try:
        words = expanded(arguments, known)
        if "--dry_run" in words and not torch.cuda.is_available():
            words.append("--use_cpu")  # it is looked at before there is a GPU
        script, args, *_, rest = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True
        )
        if rest:
            name = rest[0].partition("=")[0]
            near = suggestion(_setting(name), known)
            raise ValueError(f"there is no option {name}{near}")
        if not (
            script.teacher_model_name_or_path
            or script.teacher_cache
            or script.teacher_server
            or script.hard_labels
        ):
            raise ValueError(
                "no teacher: expected --teacher_model_name_or_path, --teacher_cache, "
                "--teacher_server or --hard_labels"
            )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return script, args, parser


def _parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        (ScriptArguments, SADConfig),  # type: ignore[arg-type]
        prog=PROG,
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    ours = {f.name for f in fields(SADConfig) if f.name in SADConfig.__annotations__}
    parser.add_argument("--config", help="A YAML file of any of these settings; see examples/.")
    hidden = {f.name for f in fields(TrainingArguments)} - ours - set(SHOWN)
    for action in parser._actions:
        # Help shows one spelling of each; --like-this is understood too.
        if action.nargs != 0:
            action.option_strings = action.option_strings[:1]
        if action.dest == "gradient_checkpointing":  # called deprecated, and understood by all
            action.help = "Compute activations again in the backward pass: less memory, more time."
        off = action.nargs == 0 and action.const is False  # of a switch that is shown itself
        if off or action.dest in hidden or action.dest == "remove_unused_columns":
            action.help = argparse.SUPPRESS
        elif action.dest == "lr_scheduler_type":
            action.metavar = "NAME"  # of a dozen
        elif action.nargs != 0 and action.choices is None:  # a name twice in a line says no more
            kind = getattr(action.type, "__name__", "str")
            action.metavar = "BOOL" if kind == "string_to_bool" else kind.upper()
    return parser
