"""The contrastive term is its formula; it joins the loss with its weight and is logged."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import small_model
from small_trainers import trainer_for

from sadkern.data import SpanCollator, inputs_of, trajectory_of
from sadkern.forward import supervised_hidden
from sadkern.train import SADConfig
from sadkern.train.contrast import span_contrast


def plainly(hidden, kinds, sequences, temperature):
    """The formula, a pair at a time."""
    pooled = {}
    for i in sorted({int(s) for s in sequences}):
        spans = [hidden[(sequences == i) & (kinds == kind)] for kind in (1, 2)]
        if all(len(span) for span in spans):
            pooled[i] = [span.mean(0) / span.mean(0).norm() for span in spans]
    total = 0.0
    for i, (reason, act) in pooled.items():
        for own, others in ((reason, 1), (act, 0)):
            scores = {j: float(own @ pooled[j][others]) / temperature for j in pooled}
            total += math.log(sum(math.exp(x) for x in scores.values())) - scores[i]
    return total / (2 * len(pooled))


def example():
    torch.manual_seed(0)
    kinds = torch.tensor([1, 1, 2, 2, 1, 1, 1, 2, 1, 1, 2])
    sequences = torch.tensor([0, 0, 0, 2, 2, 3, 3, 3, 5, 5, 6])  # 5 and 6 have one kind alone
    return torch.randn(11, 6, dtype=torch.float64), kinds, sequences


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_term_is_its_formula(temperature):
    hidden, kinds, sequences = example()
    found = span_contrast(hidden, kinds, sequences, temperature)
    assert found.item() == pytest.approx(plainly(hidden, kinds, sequences, temperature), rel=1e-12)
    order = torch.randperm(11)
    again = span_contrast(hidden[order], kinds[order], sequences[order], temperature)
    assert again.item() == pytest.approx(found.item(), rel=1e-12)
    assert span_contrast(7 * hidden, kinds, sequences, temperature) == pytest.approx(found.item())


def test_its_gradient_is_that_of_finite_differences():
    hidden, kinds, sequences = example()
    assert torch.autograd.gradcheck(
        lambda x: span_contrast(x, kinds, sequences, 0.5), hidden.requires_grad_()
    )


def test_alone_there_is_nothing_to_tell_apart():
    hidden, kinds, _ = example()
    hidden.requires_grad_()
    term = span_contrast(hidden, kinds, torch.zeros(11, dtype=torch.int64))
    term.backward()
    assert term == 0
    assert not hidden.grad.any()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("packed", [False, True])
def test_it_joins_the_loss_with_its_weight(tmp_path, examples, packed):
    student = small_model(0)
    batch = SpanCollator(0)(examples)
    hidden = supervised_hidden(student, batch["rows"], **inputs_of(batch)).detach().double()
    kinds = batch["span_ids"].flatten()[batch["rows"]]
    own = trajectory_of(**inputs_of(batch))[batch["rows"]]
    expected = plainly(hidden, kinds, own, 0.2)
    trainer = trainer_for(
        tmp_path, student, small_model(1), examples, contrast_weight=0.3, contrast_temperature=0.2,
        padding_free=packed,
    )  # fmt: skip
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["contrast"] == pytest.approx(expected, rel=1e-4)
    assert entry["loss"] == pytest.approx(
        entry["reason/kl"] + entry["act/kl"] + 0.3 * expected, rel=1e-4
    )


def test_it_needs_hidden_states(tmp_path):
    with pytest.raises(ValueError, match=r"contrast_weight=0\.1 is of hidden states: expected"):
        SADConfig(output_dir=str(tmp_path), contrast_weight=0.1, projection=False, report_to="none")
