"""Every recipe runs as it is written, on models of its kind that are small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from command import sadkern
from small_models import RECORDS, V, small_model, small_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "paper")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not RECIPES.is_dir(), reason="needs examples/ beside the tests"),
]
KINDS = {
    "gpt2": lambda _: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=256)
    ),
    "opt": lambda _: OPTForCausalLM(
        OPTConfig(
            vocab_size=V, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=256, word_embed_proj_dim=16, pad_token_id=0,
        )
    ),
    "llama": lambda seed: small_model(seed, hidden=64),
}  # fmt: skip


def test_there_is_one_for_each_of_the_papers_students():
    students = {
        *("gpt2-120m", "gpt2-340m", "gpt2-760m", "llama-7b", "opt-1.3b", "opt-2.7b", "opt-6.7b")
    }
    others = {"llama-7b-full", "llama-7b-fsdp", "llama-7b-lora", "llama-7b-lora-4bit"}
    assert set(NAMES) - students == others
    for name in students | {"llama-7b-lora", "llama-7b-lora-4bit"}:  # the others keep no gradients
        settings = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        assert batch == 64


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(tmp_path, name):
    for seed, side in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        KINDS[name.split("-")[0]](seed).save_pretrained(tmp_path / side)
        small_tokenizer().save_pretrained(tmp_path / side)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    settings = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    # One process on a CPU shares with nobody; test_distributed.py has several.
    recipe = tmp_path / f"{name}.yaml"
    alone = {key: value for key, value in settings.items() if not key.startswith("fsdp")}
    recipe.write_text(yaml.safe_dump(alone))
    teacher = ["--teacher_model_name_or_path", tmp_path / "teacher"]
    if "teacher_cache" in settings:
        made = sadkern(
            "cache", "--model", tmp_path / "teacher", "--data", data, "--k", 32,
            "--output", tmp_path / "cache",
        )  # fmt: skip
        assert made.exit_code == 0, made.output
        teacher = ["--teacher_cache", tmp_path / "cache"]
    done = sadkern(
        "train", "--config", RECIPES / "paper.yaml", "--config", recipe,
        "--model_name_or_path", tmp_path / "student", *teacher, "--dataset_name", data,
        "--output_dir", tmp_path / "out", "--use_cpu", "--max_steps", 6, "--logging_steps", 1,
        "--per_device_train_batch_size", 2,
        "--gradient_accumulation_steps", 1 if "optimizer_in_backward" in settings else 4,
        "--warmup_steps", 0, "--learning_rate", 1e-2,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
