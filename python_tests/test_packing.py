"""Packed one behind the other, trajectories give what they give padded, whoever the teacher is."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import small_model
from small_trainers import assert_same, plainly, trainer_for
from test_forward import MODELS, SIZES, V, gradients
from transformers import LlamaConfig, LlamaForCausalLM

from sadkern import span_kl
from sadkern.data import SpanCollator, inputs_of
from sadkern.forward import check_packs, head_projection, supervised_loss
from sadkern.teacher import CachedTeacher, OnlineTeacher
from sadkern.teacher.source import trajectories

pytestmark = pytest.mark.usefixtures("one_thread")


SHORT = [
    {"input_ids": [5, 9, 4, 7, 3, 8, 6], "span_ids": [1, 1, 0, 2, 2, 2, 0]},
    {"input_ids": [4, 4, 9], "span_ids": [0, 1, 0]},
    {"input_ids": [8, 3, 5, 5, 6], "span_ids": [0, 2, 0, 1, 0]},
]


def test_a_packed_batch_holds_the_same():
    padded, packed = SpanCollator(0)(SHORT), SpanCollator(0, packed=True)(SHORT)
    assert packed["input_ids"].tolist() == [[5, 9, 4, 7, 3, 8, 6, 4, 4, 9, 8, 3, 5, 5, 6]]
    assert packed["position_ids"].tolist() == [[*range(7), *range(3), *range(5)]]
    assert packed["rows"].tolist() == [0, 1, 3, 4, 5, 8, 11, 13]
    assert "attention_mask" not in packed
    for batch in (padded, packed):
        found = [
            (ids.tolist(), positions.tolist())
            for ids, positions in trajectories(batch["rows"], **inputs_of(batch))
        ]
        assert found == [
            (one["input_ids"], [p for p, span in enumerate(one["span_ids"]) if span])
            for one in SHORT
        ]


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_the_padded_batch(name, attention):
    model = MODELS[name]().double().train()
    if attention:
        model.set_attn_implementation(attention)
    check_packs(model)
    assert model.training
    projection = head_projection(model)
    teacher = torch.randn(8, V, dtype=torch.float64)
    found = []
    for packed in (False, True):
        batch = SpanCollator(0, packed=packed)(SHORT)
        kinds = batch["span_ids"].flatten()[batch["rows"]]
        loss = supervised_loss(
            model, batch["rows"], lambda own, kinds=kinds: span_kl(own, teacher, kinds).loss,
            projection, **inputs_of(batch),
        )  # fmt: skip
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-7, atol=0)
    # Some models compute their norms in fp32, whatever they are in.
    atol = 2e-6 * max(gradient.abs().max().item() for gradient in found[0][1].values())
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, rtol=0, atol=atol, msg=key)


class Blind(LlamaForCausalLM):
    """Knows neither position_ids nor masks."""

    def forward(self, input_ids, **_):
        return super().forward(input_ids, use_cache=False)


def test_a_model_whose_trajectories_see_each_other_is_refused(tmp_path, examples):
    sizes = {**SIZES, "vocab_size": 300, "max_position_embeddings": 256}
    model = Blind(LlamaConfig(**sizes))
    said = "Blind lets packed trajectories see each other: expected .*padding_free=False"
    with pytest.raises(ValueError, match=said):
        trainer_for(tmp_path, model, small_model(1), examples, padding_free=True)
    with pytest.raises(ValueError, match=said):
        trainer_for(tmp_path, small_model(1), model, examples, padding_free=True)
    trainer_for(tmp_path, model, small_model(1), examples)


@pytest.mark.parametrize("size", [8, 3])
def test_a_packed_step_is_the_plain_computation(tmp_path, examples, size):
    student, teacher = small_model(0), small_model(1, hidden=24, scale=2.0)
    loss, gradient, logged = plainly(student, teacher, examples)
    trainer = trainer_for(
        tmp_path, student, teacher, examples, padding_free=True,
        per_device_train_batch_size=size, gradient_accumulation_steps=-(-8 // size),
    )  # fmt: skip
    trainer.train()
    assert_same(trainer.gradients.steps[0], gradient)
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(loss, rel=1e-4)
    assert {key: entry[key] for key in logged} == pytest.approx(logged, rel=1e-5)
    tokens, rows = (sum(len([x for x in one[k] if x or k == "input_ids"]) for one in examples)
                    for k in ("input_ids", "span_ids"))  # fmt: skip
    assert entry["supervised_share"] == pytest.approx(rows / tokens)


def test_what_a_packed_run_wrote_a_padded_one_reads(tmp_path, examples, tokenizer):
    teacher = OnlineTeacher(small_model(1, scale=3.0))
    steps = {}
    for packed, source in ((True, teacher), (False, None), (True, None)):
        cached = CachedTeacher(tmp_path / "cache", source, tokenizer=tokenizer, k=300)
        trainer = trainer_for(
            tmp_path, copy.deepcopy(small_model(0)), cached, examples, tokenizer,
            padding_free=packed,
        )  # fmt: skip
        trainer.train()
        steps[packed, source is None] = trainer.gradients.steps[0]
    assert_same(steps[True, True], steps[True, False], 1e-6)
    assert_same(steps[False, True], steps[True, True])
