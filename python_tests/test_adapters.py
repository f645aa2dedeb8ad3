"""Adapters and optimizers: what is trained, what is saved, what is loaded again."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from small_models import small_model
from small_trainers import trainer_for
from transformers import AutoModelForCausalLM

from sadkern.train import SADConfig, SADTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}


def adapted(tmp_path, student, examples, lora, **settings):
    base = trainer_for(tmp_path, student, small_model(1), examples)
    return SADTrainer(
        model=student, teacher_model=small_model(1), train_dataset=examples, peft_config=lora,
        args=SADConfig(**{**base.args.to_dict(), "max_steps": 4, **settings}),
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_alone_are_trained_and_load_in_peft(tmp_path, examples, checkpointing):
    student = small_model(0)
    before = copy.deepcopy(student.state_dict())
    torch.manual_seed(0)
    trainer = adapted(
        tmp_path, student, examples, LoraConfig(**LORA), gradient_checkpointing=checkpointing
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert torch.equal(p, start[name]) != ("lora_" in name), name
    first, last = (trainer.state.log_history[i]["loss"] for i in (0, 3))
    assert last < first

    trainer.save_model(str(tmp_path / "saved"))
    base = small_model(0)
    base.load_state_dict(before)
    base.save_pretrained(tmp_path / "base")
    ids = torch.tensor([examples[0]["input_ids"]])
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "saved"
    )
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
        assert not torch.equal(loaded(ids).logits, base(ids).logits)


def test_an_adapted_head_is_refused_or_its_logits_are_taken(tmp_path, examples):
    lora = LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(ValueError, match=r"the head of PeftModel.* has .*lora_.*projection=False"):
        adapted(tmp_path, small_model(0), examples, lora)
    trainer = adapted(tmp_path, small_model(0), examples, lora, projection=False)
    trainer.train()
    assert trainer.state.log_history[3]["loss"] < trainer.state.log_history[0]["loss"]


def test_a_head_that_is_trained_whole_beside_adapters(tmp_path, examples):
    """`modules_to_save`: its gradient comes from the projection."""
    lora = LoraConfig(**{**LORA, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    runs = []
    for projection in (True, False):
        torch.manual_seed(0)
        trainer = adapted(tmp_path, small_model(0), examples, lora, projection=projection)
        trainer.train()
        runs.append({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert any("lm_head" in name for name in runs[0])
    for name, weight in runs[0].items():
        torch.testing.assert_close(weight, runs[1][name], rtol=0, atol=1e-4, msg=name)


def test_a_saved_student_loads_in_plain_transformers(tmp_path, examples):
    trainer = trainer_for(tmp_path, small_model(0), small_model(1), examples)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_steps_in_backward_are_those_of_the_optimizer(tmp_path, examples, optim):
    runs = []
    for inside in (False, True):
        trainer = trainer_for(
            tmp_path, small_model(0), small_model(1), examples, max_steps=5, optim=optim,
            optimizer_in_backward=inside, weight_decay=0.1, lr_scheduler_type="cosine",
            warmup_steps=2,
        )  # fmt: skip
        if inside:
            trainer.remove_callback(trainer.gradients)  # there are none left to look at
        trainer.train()
        runs.append(trainer)
    assert all(p.grad is None for p in runs[1].model.parameters())
    for name, weight in runs[0].model.state_dict().items():
        assert torch.equal(runs[1].model.state_dict()[name], weight), name
    assert [log.get("loss") for log in runs[0].state.log_history] == (
        [log.get("loss") for log in runs[1].state.log_history]
    )


@pytest.mark.parametrize(
    "settings", [{"max_grad_norm": 1.0}, {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}]
)
def test_what_needs_all_gradients_at_once_is_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=r"optimizer_in_backward .* expected max_grad_norm=0"):
        SADConfig(
            output_dir=str(tmp_path), optimizer_in_backward=True, report_to="none", **settings
        )
