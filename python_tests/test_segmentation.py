"""The paper's ablations and baselines are what their names say."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_model
from small_trainers import assert_same, plainly, trainer_for

from sadkern.teacher import HardLabels
from sadkern.train import SADConfig
from sadkern.train.segmentation import resegmented

pytestmark = pytest.mark.usefixtures("one_thread")


def runs(spans):
    return sorted((kind, len(list(run))) for kind, run in groupby(spans) if kind)


@given(st.lists(st.sampled_from([0, 0, 1, 2]), min_size=1, max_size=40), st.integers(0, 9))
def test_random_spans_are_the_same_elsewhere(spans, seed):
    example = {"input_ids": list(range(len(spans) + 1)), "span_ids": [*spans, 0]}
    found = resegmented(example, "random", seed)
    assert found["input_ids"] == example["input_ids"]
    assert found["span_ids"][-1] == 0
    for kind in (0, 1, 2):
        assert found["span_ids"].count(kind) == example["span_ids"].count(kind)
    assert found == resegmented(example, "random", seed)
    # Runs stay whole: shuffled ones may come to touch, none is cut.
    assert len(runs(found["span_ids"])) <= len(runs(spans))
    assert max(runs(found["span_ids"]), default=0) >= max(runs(spans), default=0)


def test_random_spans_depend_on_the_seed_and_the_trajectory(examples):
    first = [resegmented(example, "random", 0)["span_ids"] for example in examples]
    assert first != [example["span_ids"] for example in examples]
    assert first != [resegmented(example, "random", 1)["span_ids"] for example in examples]


def flat(student, teacher, examples):
    """The gradient under one normaliser, by hand."""
    _, reason, logged = plainly(student, teacher, examples, act_weight=0.0)
    _, act, _ = plainly(student, teacher, examples, reason_weight=0.0)
    n, m = logged["reason/tokens"], logged["act/tokens"]
    kl = (n * logged["reason/kl"] + m * logged["act/kl"]) / (n + m)
    return kl, {name: (n * reason[name] + m * act[name]) / (n + m) for name in reason}


@pytest.mark.parametrize("segmentation", ["flat", "all"])
@pytest.mark.parametrize(("size", "steps"), [(8, 1), (3, 3)])
def test_one_span_has_one_normaliser(tmp_path, examples, segmentation, size, steps):
    student, teacher = small_model(0), small_model(1)
    changed = [resegmented(example, segmentation, 0) for example in examples]
    if segmentation == "all":
        assert all(sum(x == 0 for x in one["span_ids"]) == 1 for one in changed)
    else:
        assert [one["span_ids"] for one in changed] == [one["span_ids"] for one in examples]
    loss, gradient = flat(student, teacher, changed)
    trainer = trainer_for(
        tmp_path, student, teacher, examples, segmentation=segmentation, eval_dataset=changed,
        per_device_train_batch_size=size, gradient_accumulation_steps=steps,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    trainer.train()
    assert_same(trainer.gradients.steps[0], gradient)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(loss, rel=1e-4)


def test_random_spans_are_trained_on_and_evaluation_keeps_its_own(tmp_path, examples):
    student, teacher = small_model(0), small_model(1)
    changed = [resegmented(example, "random", 42) for example in examples]
    _, gradient, _ = plainly(student, teacher, changed)
    loss, _, _ = plainly(student, teacher, examples)
    trainer = trainer_for(
        tmp_path, student, teacher, examples, segmentation="random", eval_dataset=examples
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    trainer.train()
    assert_same(trainer.gradients.steps[0], gradient)


def test_hard_labels_are_the_cross_entropy(tmp_path, examples):
    """Equation (13)."""
    student = small_model(0)
    double = small_model(0).double()
    sums = {1: [], 2: []}
    for example in examples:
        ids = torch.tensor(example["input_ids"])
        logprobs = double(ids[None]).logits[0].log_softmax(-1)
        for p, kind in enumerate(example["span_ids"]):
            if kind:
                sums[kind].append(-logprobs[p, ids[p + 1]])
    loss = sum(torch.stack(rows).mean() for rows in sums.values())
    loss.backward()
    trainer = trainer_for(tmp_path, student, HardLabels(), examples)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad for name, p in double.named_parameters()}
    assert_same(trainer.gradients.steps[0], expected)


def test_a_segmentation_that_is_none_is_told(tmp_path):
    with pytest.raises(ValueError, match="segmentation='fine': expected spans, flat, all, random"):
        SADConfig(output_dir=str(tmp_path), segmentation="fine", report_to="none")
