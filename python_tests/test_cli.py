"""The command line from end to end, on models small enough to be made here."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import sadkern
from peft import PeftModel
from small_models import RECORDS, small_model, small_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from sadkern import __version__
from sadkern.teacher import OnlineTeacher, ServerError
from sadkern.train import arguments
from sadkern.train.arguments import expanded
from sadkern.train.script import last_checkpoint

TEACHER = ["--teacher_model_name_or_path", "teacher"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def files(tmp_path):
    """Student, teacher and trajectories in a folder; the student as most are saved, in bfloat16."""
    small_model(0).to(torch.bfloat16).save_pretrained(tmp_path / "student")
    small_model(1, hidden=24, scale=2.0).save_pretrained(tmp_path / "teacher")
    for side in ("student", "teacher"):
        small_tokenizer().save_pretrained(tmp_path / side)
    lines = [json.dumps(record) for record in RECORDS]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[:6], "{cut off", ""]))
    (tmp_path / "eval.jsonl").write_text("\n".join(lines[6:]))
    return tmp_path


def train(folder, *options):
    return sadkern(
        "train",
        "--model_name_or_path", folder / "student",
        "--teacher_model_name_or_path", folder / "teacher",
        "--dataset_name", folder / "train.jsonl",
        "--output_dir", folder / "out",
        "--logging_steps", 1, "--learning_rate", 1e-2, "--use_cpu",
        *options,
    )  # fmt: skip


def history(folder):
    return json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]


def test_train_from_files_to_a_student_that_loads_back(files, caplog):
    with caplog.at_level(logging.WARNING):
        done = train(files, "--eval_dataset_name", files / "eval.jsonl", "--max_steps", 12)
    assert done.exception is None, done.exception
    assert f"the student is in {files / 'out'}, after 12 steps" in done.output
    assert f"{files / 'train.jsonl'}:7 left out" in caplog.text

    *steps, summary, evaluation = history(files)
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    for key in ("reason/kl", "act/kl"):
        assert steps[-1][key] < 0.8 * steps[0][key]
    for entry in steps:  # the two spans are the loss
        assert entry["loss"] == pytest.approx(entry["reason/kl"] + entry["act/kl"], rel=1e-4)
    assert "train_runtime" in summary
    assert evaluation["eval_loss"] == pytest.approx(
        evaluation["eval_reason/kl"] + evaluation["eval_act/kl"]
    )

    student = AutoModelForCausalLM.from_pretrained(files / "out")
    assert student.dtype == torch.float32  # trained in float32 whatever it was saved in
    assert (
        AutoTokenizer.from_pretrained(files / "out")("mug")["input_ids"]
        == (AutoTokenizer.from_pretrained(files / "student")("mug")["input_ids"])
    )
    assert not torch.equal(
        student.lm_head.weight, small_model(0).to(torch.bfloat16).float().lm_head.weight
    )


def test_the_same_command_goes_on_after_an_interruption(files):
    options = ("--save_steps", 2, "--lr_scheduler_type", "constant")
    last = ("--resume_from_checkpoint", "last")
    assert last_checkpoint(files / "out") is None
    assert train(files, *options, *last, "--max_steps", 2).exception is None  # nothing there yet
    # Killed while it wrote: weights, but not what is written last.
    shutil.copytree(files / "out" / "checkpoint-2", files / "out" / "checkpoint-10")
    (files / "out" / "checkpoint-10" / "trainer_state.json").unlink()
    assert last_checkpoint(files / "out") == str(files / "out" / "checkpoint-2")
    assert train(files, *options, *last, "--max_steps", 4).exception is None
    resumed = history(files)
    assert train(files, *options, "--max_steps", 4).exception is None
    whole = history(files)
    kls = [[(e["step"], e["act/kl"]) for e in log if "loss" in e] for log in (resumed, whole)]
    assert kls[0] == kls[1]
    assert [step for step, _ in kls[0]] == [1, 2, 3, 4]


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_a_teacher_of_another_tokenizer_is_refused(files):
    path = files / "teacher" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    done = train(files)
    assert done.exit_code == 2
    said = re.search(r"is (\d+) to \S+student and (\d+) to \S+teacher", done.output)
    one, other = said.groups()
    assert {int(one), int(other)} == {vocab["a"], vocab["b"]}


def test_what_was_added_to_a_tokenizer_may_differ(files):
    # A relative that calls its end of text by another name.
    teacher = AutoTokenizer.from_pretrained(files / "teacher")
    teacher.add_special_tokens({"pad_token": "<pad>"})
    teacher.save_pretrained(files / "teacher")
    assert train(files, "--max_steps", 1).exception is None


def test_a_teacher_without_a_tokenizer_is_told(files, caplog):
    for path in (files / "teacher").glob("tokenizer*"):
        path.unlink()
    with caplog.at_level(logging.WARNING):
        done = train(files, "--max_steps", 1)
    assert done.exception is None, done.exception
    assert "teacher has no tokenizer: it is taken to have the student's" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset_name", "missing.jsonl"], "No such file or directory: 'missing.jsonl'"),
        (["--divergence", "kl"], "divergence='kl': expected one of forward_kl"),
        (["--temprature", 2], "no option --temprature. Did you mean temperature?"),
        (["--learning-rat=2"], "no option --learning-rat. Did you mean learning_rate?"),
        (["--per_device_train_batch_size", 0], "per_device_train_batch_size=0: expected 1 or more"),
        (["--gradient_accumulation_steps", 0], "gradient_accumulation_steps=0: expected 1 or more"),
        (["--learning_rate", -1], "learning_rate=-1.0: expected 0 or more"),
        (["--num_train_epochs", -1], "num_train_epochs=-1.0, max_steps=-1: expected one of them"),
        (["--dtype", "float17"], "dtype 'float17': expected auto, float32"),
        (["--dtype", "int8"], "dtype 'int8': expected auto, float32"),
        (["--resume_from_checkpoint", "nope"], "nope: there is no checkpoint; "),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_errors_are_told_in_a_line_before_a_model_is_loaded(files, options, message):
    shutil.rmtree(files / "student")
    done = train(files, *options)
    assert done.exit_code == 2
    assert message in done.output.splitlines()[-1]
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        ("student", ["--teacher_cache", "nowhere"], "nowhere is no cache, it has no manifest.json"),
        ("student", ["--teacher_model_name_or_path", "./nowhere"], "there is no folder ./nowhere"),
        ("./nowhere", ["--hard_labels"], "there is no folder ./nowhere"),
        ("./studnt", ["--hard_labels"], "or a hub's name. Did you mean student?"),
        ("train.jsonl", ["--hard_labels"], "train.jsonl is a file: expected a model's folder"),
        ("student", [*TEACHER, "--teacher_device", "foo"], "device 'foo': expected cpu, cuda"),
        ("student", [*TEACHER, "--teacher_device", "cuda:99"], "device 'cuda:99': PyTorch sees "),
    ],
)
def test_what_is_not_there_is_told_in_a_line(files, student, options, message, monkeypatch):
    monkeypatch.chdir(files)
    done = sadkern(
        "train", "--model_name_or_path", student, "--dataset_name", "train.jsonl",
        "--output_dir", "out", "--use_cpu", *options,
    )  # fmt: skip
    assert done.exit_code == 2
    assert "sadkern train: error: " in done.output
    assert message in done.output


def test_a_teacher_that_dies_ends_the_run_with_a_line(files, monkeypatch):
    answers = iter([OnlineTeacher.__call__])

    def dying(*args, **kwargs):
        for answer in answers:
            return answer(*args, **kwargs)
        raise ServerError("http://localhost:9 failed 6 times")

    monkeypatch.setattr(OnlineTeacher, "__call__", dying)
    done = train(files)
    assert done.exit_code == 1
    assert done.output.splitlines()[-1] == "sadkern train: error: http://localhost:9 failed 6 times"
    assert last_checkpoint(files / "out") == str(files / "out" / "checkpoint-1")


def test_what_a_teacher_cannot_answer_is_refused_before_a_cache_of_it_is_made(files):
    """A tokenizer with more tokens than the teacher has embeddings of."""
    larger = small_tokenizer()
    larger.add_tokens(["mug"])
    larger.save_pretrained(files / "larger")
    done = sadkern(
        "cache", "--model", files / "teacher", "--tokenizer", files / "larger",
        "--data", files / "train.jsonl", "--output", files / "cache",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "is beyond the teacher's 300 embeddings" in done.output
    assert not (files / "cache").exists()


def test_help_teaches(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    done = sadkern("train", "--help")
    assert done.exit_code == 0
    for what in (
        "sadkern train --model_name_or_path",
        '{"text": "Thought 1: Who wrote it?\\nAction 1: Search[Emma]',
        "reason/kl and act/kl",
        "--divergence",
        "--resume_from_checkpoint last",
        "Every other option of transformers.TrainingArguments",
    ):
        assert what in done.output
    assert "--adam_beta1" not in done.output
    assert len(done.output.splitlines()) < 200


def test_options_are_understood_in_either_spelling(files, tmp_path):
    lengths = []
    for option in ("--max-length", "--max_length"):
        where = tmp_path / option
        made = sadkern(
            "cache", "--model", files / "teacher", "--data", files / "train.jsonl",
            "--output", where, option, 40,
        )  # fmt: skip
        assert made.exit_code == 0, made.output
        facts = json.loads(sadkern("cache", "info", where, "--json").output)
        lengths.append(facts["supervised tokens"])
    assert lengths[0] == lengths[1] < 6 * 40


def test_commands_are_listed_as_one_comes_to_use_them():
    said = re.findall(r"^│ (\w+)  ", sadkern("--help").output, re.MULTILINE)
    assert said == ["demo", "inspect", "train", "cache", "eval", "generate", "plan", "info"]


def test_info_says_what_is_built():
    done = sadkern("info")
    assert done.exit_code == 0
    assert done.output.startswith(f"sadkern {__version__}\n")
    assert "native:" in done.output


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--k", 400], "k=400: expected 1 to 300 for a vocabulary of 300"),
        (["--temperature", 0], "temperature=0.0: expected a positive number"),
        (["--k", 0], "greater than or equal to 1"),
        (["--batch-size", 0], "greater than or equal to 1"),
        (["--dtype", "foo"], "dtype 'foo': expected auto"),
        (["--device", "cuda:99"], "device 'cuda:99': PyTorch sees "),
    ],
)
def test_what_no_cache_may_be_leaves_none_behind(files, wrong, said):
    done = sadkern(
        "cache", "--model", files / "teacher", "--data", files / "train.jsonl",
        "--output", files / "cache", *wrong,
    )  # fmt: skip
    assert done.exit_code == 2
    assert said in done.output
    assert not (files / "cache").exists()


def test_a_cache_is_made_looked_at_and_trained_from(files, tmp_path):
    where, data = str(tmp_path / "cache"), str(files / "train.jsonl")
    made = sadkern("cache", "--model", files / "teacher", "--data", data, "--output", where)
    assert made.exit_code == 0, made.output
    facts = json.loads(sadkern("cache", "info", where, "--json").output)
    assert facts["k"] == 64
    assert facts["trajectories"] == 6
    other = sadkern(
        "train", "--model_name_or_path", files / "student", "--teacher_cache", where, "--use_cpu",
        "--teacher_k", 32, "--dataset_name", data, "--output_dir", files / "out",
    )  # fmt: skip
    assert other.exit_code == 2
    assert "has 64 tokens of a row, not --teacher_k 32" in other.output
    assert "every byte as it was written" in sadkern("cache", "verify", where).output
    (shard,) = (tmp_path / "cache" / "shards").iterdir()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    wrong = sadkern("cache", "verify", where)
    assert wrong.exit_code == 1
    assert shard.name in wrong.output
    shard.write_bytes(whole)
    refused = sadkern(
        "cache", "--model", files / "teacher", "--data", data, "--output", where, "--k", 9
    )
    assert refused.exit_code == 2
    assert "k is 64 there and 9 here" in refused.output
    assert "expected --data FILE and --output DIR" in sadkern("cache", "--k", 9).output.replace(
        "\n", " "
    )
    done = train(files, "--teacher_cache", where, "--max_steps", 2)
    assert done.exception is None, done.exception
    done = train(files, "--teacher_cache", where, "--temperature", 2)
    assert done.exit_code == 2
    assert "temperature is 1.0 there and 2.0 here" in done.output.splitlines()[-1]
    merged = sadkern("cache", "merge", where, "--output", tmp_path / "merged")
    assert "6 trajectories of 1 stores" in merged.output


def test_a_config_file_stands_for_options(files):
    (files / "run.yaml").write_text(
        f"model_name_or_path: {files / 'student'}\n"
        f"teacher_model_name_or_path: {files / 'teacher'}\n"
        f"dataset_name: {files / 'train.jsonl'}\noutput_dir: {files / 'out'}\nuse_cpu: true\n"
        "divergence: reverse_kl\nmax_steps: 2\nlogging_steps: 1\nlr_scheduler_type: constant\n"
        "curriculum_weights: [1, 0.5, 0]\neval_dataset_name: null\n"
        "lr_scheduler_kwargs: {}\n"
    )
    done = sadkern("train", "--config", files / "run.yaml", "--max_steps", 1, "--curriculum=root")
    assert done.exit_code == 0, done.output
    args = torch.load(files / "out" / "training_args.bin", weights_only=False)
    assert (args.divergence, args.max_steps, args.curriculum) == ("reverse_kl", 1, "root")
    assert args.curriculum_weights == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model_name_or_path: [", "run.yaml is not YAML"),
        ("- 1", "run.yaml holds a list: expected names and values"),
        ("learning_rat: 1", "run.yaml: there is no setting 'learning_rat'. Did you mean learning_"),
        ("divergence: forwards", "divergence='forwards'"),
    ],
)
def test_a_config_file_that_is_none_is_told(files, text, said):
    (files / "run.yaml").write_text(text)
    done = train(files, "--config", files / "run.yaml")
    assert done.exit_code == 2
    assert said in done.stderr.splitlines()[-1]


def test_the_papers_settings_are_looked_at_before_there_is_a_gpu(files):
    settings = Path(__file__).resolve().parents[1] / "examples" / "recipes" / "paper.yaml"
    done = sadkern(
        "train", "--model_name_or_path", files / "student", "--config", settings, "--dry_run",
        "--teacher_model_name_or_path", files / "teacher", "--output_dir", files / "out",
        "--dataset_name", files / "train.jsonl",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert not (files / "out").exists()


def test_a_switch_of_yaml_is_one_of_the_command_line(tmp_path):
    """`fsdp: true` is what transformers takes as a bare --fsdp."""
    (tmp_path / "some.yaml").write_text("fsdp: true\nbf16: false\nseed: 3\n")
    words = expanded(
        ["--config", str(tmp_path / "some.yaml"), "--seed", "4"], {"fsdp", "bf16", "seed"}
    )
    assert words == ["--fsdp", "--bf16", "False", "--seed", "3", "--seed", "4"]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(files):
    done = train(
        files, "--dry_run", "--num_train_epochs", 2, "--per_device_train_batch_size", 2,
        "--curriculum", "linear", "--gradient_accumulation_steps", 2, "--use_peft",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.replace("│", " ").split())
    for what in (
        "0.01M parameters",
        "6 trajectories",
        "2 x 2 accumulated x 1 processes = 4",
        "steps 4, 2 an epoch",
        "linear over 1 epochs from 33%",
        "LoRA of rank 16 on all-linear",
    ):
        assert what in said, said
    assert not (files / "out").exists()


def test_an_adapter_is_trained_and_saved(files):
    done = train(files, "--max_steps", 2, "--use_peft", "--lora_r", 2, "--dtype", "float32")
    assert done.exit_code == 0, done.output
    base = AutoModelForCausalLM.from_pretrained(files / "student")
    loaded = PeftModel.from_pretrained(base, files / "out")
    assert loaded.peft_config["default"].r == 2
    changed = [x for name, x in loaded.named_parameters() if "lora_B" in name]
    assert changed
    assert all(x.any() for x in changed)  # they begin at zero


def test_the_baseline_needs_no_teacher(files):
    done = sadkern(
        "train", "--model_name_or_path", files / "student", "--hard_labels", "--max_steps", 1,
        "--dataset_name", files / "train.jsonl", "--output_dir", files / "out", "--use_cpu",
        "--logging_steps", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (entry,) = [entry for entry in history(files) if "loss" in entry]
    assert entry["teacher_entropy"] == 0
    assert entry["loss"] == pytest.approx(entry["reason/kl"] + entry["act/kl"], rel=1e-4)


def test_without_typer_the_command_says_what_to_install():
    script = "import sys; sys.modules['typer'] = None; import sadkern.cli"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("expected `pip install 'sadkern[train]'`")
    assert "Traceback" not in done.stderr


def test_the_help_of_train_fits_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = arguments._parser().format_help().splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "(default: None)" in line or "--no_" in line]
