"""A trainer of models as small as tests', and what its steps are to come to, in plain torch."""

from __future__ import annotations

import copy

import torch
from transformers import TrainerCallback

from sadkern.spans import ACT, REASON
from sadkern.train import SADConfig, SADTrainer


class Gradients(TrainerCallback):
    """Those of each step, as the optimizer would see them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters()})


def trainer_for(tmp_path, student, teacher, train, tokenizer=None, **settings):
    settings = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    evaluate = settings.pop("eval_dataset", None)
    trainer = SADTrainer(
        model=student,
        teacher_model=teacher,
        args=SADConfig(**settings),
        train_dataset=train,
        eval_dataset=evaluate,
        processing_class=tokenizer,
    )
    trainer.gradients = Gradients()
    trainer.add_callback(trainer.gradients)
    return trainer


def repeatable(log):
    """What a second run logs again: not what depends on the machine's hour."""
    machine = ("_per_second", "runtime", "peak_memory")
    return {key: value for key, value in log.items() if not any(name in key for name in machine)}


def plainly(
    student,
    teacher,
    examples,
    *,
    temperature=1.0,
    reason_weight=1.0,
    act_weight=1.0,
    ce_weight=0.0,
    divergence="forward_kl",
):
    """Loss, its gradient and what is logged: float64, one sequence at a time, whole logits."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    kl, ce, entropy, kinds, agree = [], [], [], [], []
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        s, t = student(ids).logits[0], teacher(ids).logits[0].detach()
        logq, logp = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
        if divergence == "reverse_kl":
            kl += (logq.exp() * (logq - logp)).sum(-1)[:-1]
        else:
            kl += (logp.exp() * (logp - logq)).sum(-1)[:-1]
        ce += torch.nn.functional.cross_entropy(s[:-1], ids[0, 1:], reduction="none")
        entropy += -(logp.exp() * logp).sum(-1)[:-1]
        agree += (s.argmax(-1) == t.argmax(-1))[:-1]
        kinds += example["span_ids"][:-1]
    kl, ce, entropy, agree = (torch.stack(values) for values in (kl, ce, entropy, agree))
    member = {name: torch.tensor(kinds) == k for name, k in (("reason", REASON), ("act", ACT))}
    logged = {"teacher_entropy": entropy[torch.tensor(kinds) != 0].mean().item()}
    loss = torch.zeros((), dtype=torch.float64)
    for (name, rows), weight in zip(member.items(), (reason_weight, act_weight), strict=True):
        loss = loss + weight * (kl[rows] + ce_weight * ce[rows]).mean()
        logged[f"{name}/tokens"] = rows.sum().item()
        logged[f"{name}/kl"] = kl[rows].mean().item()
        logged[f"{name}/agreement"] = agree[rows].double().mean().item()
        if ce_weight:
            logged[f"{name}/ce"] = ce[rows].mean().item()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters()}, logged


def assert_same(found, expected, tolerance=2e-5):
    """Gradients alike, up to rounding of the largest of each parameter."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = tolerance * gradient.abs().max().item()
        torch.testing.assert_close(
            found[name].to(gradient.dtype), gradient, rtol=0, atol=atol, msg=name
        )
