"""A head that sees the supervised rows only gives what the whole forward gives on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bench.formulas import logits_in_torch
from sadkern.forward import (
    head_projection,
    output_head,
    supervised_hidden,
    supervised_logits,
    supervised_loss,
)
from sadkern.span_kl import span_kl
from sadkern.teacher import OnlineTeacher

V = 37
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# No dropout, so that two forward passes are the same in train mode too.
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=32,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=V, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=8, dropout=0.0,
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=4)),
    "gemma2": lambda: Gemma2ForCausalLM(
        # A cap that bends these small logits: without it in force the figures would differ.
        Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=0.1, query_pre_attn_scalar=4)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
}  # fmt: skip


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two sequences, the second of them padded."""
    input_ids = torch.randint(3, V, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 6:] = attention_mask[1, 6:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


ROWS = torch.tensor([2, 3, 7, 9, 13])  # the flattened [2 * 9], none of them padding


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_whole_forward(name, batch):
    model = MODELS[name]().double().train()
    whole = model(**batch).logits.flatten(0, 1)[ROWS]
    ours = supervised_logits(model, ROWS, **batch)
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-14)

    direction = torch.randn(len(ROWS), V, dtype=torch.float64)
    (whole * direction).sum().backward()
    expected = gradients(model)
    (ours * direction).sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-13, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_a_gradient_written_over_the_logits_is_the_same(name, batch):
    # What the trainer does: whatever follows the head (softcap, scale) must not need its output.
    model = MODELS[name]().train()
    teacher = torch.randn(len(ROWS), V)
    kinds = torch.tensor([1, 1, 2, 2, 1])
    found = {}
    for inplace in (False, True):
        student = supervised_logits(model, ROWS, **batch)
        span_kl(student, teacher, kinds, inplace=inplace).loss.backward()
        found[inplace] = gradients(model)
    assert found[True].keys() == found[False].keys()
    for key, gradient in found[False].items():
        assert torch.equal(found[True][key], gradient), key


@pytest.mark.parametrize("name", MODELS)
def test_a_projection_is_what_the_whole_forward_does(name, batch):
    model = MODELS[name]().double().eval()
    whole = model(**batch).logits.flatten(0, 1)[ROWS]
    hidden = supervised_hidden(model, ROWS, **batch)
    ours = logits_in_torch(replace(head_projection(model), hidden=hidden))
    torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-12)
    head_projection(model.bfloat16())  # told apart from a wrong head in any dtype


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_from_hidden_states_is_that_of_the_logits(name, batch):
    model = MODELS[name]().double().train()
    teacher = torch.randn(len(ROWS), V, dtype=torch.float64)
    found = []
    for projection in (None, head_projection(model)):
        loss = supervised_loss(
            model, ROWS, lambda own: span_kl(own, teacher, torch.tensor([1, 1, 2, 2, 1])).loss,
            projection, **batch,
        )  # fmt: skip
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (expected, whole), (ours, from_hidden) = found
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    assert from_hidden.keys() == whole.keys()
    for key, gradient in whole.items():
        torch.testing.assert_close(from_hidden[key], gradient, rtol=1e-8, atol=1e-12, msg=key)


def test_a_bias_of_the_head_is_found(batch):
    model = MODELS["llama"]().double().eval()
    model.lm_head = torch.nn.Linear(16, V, dtype=torch.float64)
    model.config.tie_word_embeddings = False
    whole = model(**batch).logits.flatten(0, 1)[ROWS]
    found = replace(head_projection(model), hidden=supervised_hidden(model, ROWS, **batch))
    assert found.bias is not None
    torch.testing.assert_close(logits_in_torch(found), whole, rtol=1e-9, atol=1e-12)


class Shifted(LlamaForCausalLM):
    """Does to its logits what no `Projection` can say."""

    def forward(self, **inputs):
        out = super().forward(**inputs)
        out.logits = out.logits.exp()
        return out


class Twice(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_what_no_projection_can_say_is_refused_by_name():
    model = Shifted(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="Shifted changes its logits after the head: expected"):
        head_projection(model)
    model = MODELS["qwen2"]()
    model.lm_head = Twice(16, V, bias=False)
    with pytest.raises(ValueError, match="head of Qwen2ForCausalLM is no plain linear layer"):
        head_projection(model)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="head of Qwen2ForCausalLM is a Sequential: expected"):
        head_projection(model)


def test_the_head_sees_the_supervised_rows_only(batch):
    model = MODELS["llama"]()
    seen = []
    # The wrapped matrix product itself, so that no order of hooks is relied upon.
    matmul = model.lm_head.forward
    model.lm_head.forward = lambda hidden: seen.append(tuple(hidden.shape)) or matmul(hidden)
    supervised_logits(model, ROWS, **batch)
    assert seen == [(5, 16)]
    model(**batch)
    assert seen[1:] == [(2, 9, 16)]  # and the model is left as it was


def test_the_model_is_left_as_it_was_when_its_forward_fails(batch):
    model = MODELS["llama"]()
    with pytest.raises(IndexError):
        supervised_logits(model, torch.tensor([18]), **batch)
    assert "forward" not in vars(model.lm_head)


def test_no_row_gives_no_logits_and_a_zero_gradient(batch):
    model = MODELS["gemma2"]()
    student = supervised_logits(model, ROWS[:0], **batch)
    loss = span_kl(student, torch.zeros(0, V), ROWS[:0], inplace=True).loss
    loss.backward()
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_a_head_is_found_through_wrappers():
    model = MODELS["gpt2"]()

    class Wrapper(torch.nn.Module):  # as DDP has it
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert output_head(Wrapper(Wrapper(model))) is model.lm_head


def test_a_model_without_a_head_is_refused_by_name(batch):
    backbone = LlamaModel(LlamaConfig(**SIZES))
    for call in (output_head, OnlineTeacher, lambda m: supervised_logits(m, ROWS, **batch)):
        with pytest.raises(ValueError, match="LlamaModel has no output head"):
            call(backbone)


def test_a_head_that_is_not_called_is_told(batch):
    model = MODELS["llama"]()
    model.get_output_embeddings = lambda: torch.nn.Linear(16, V)
    with pytest.raises(ValueError, match=r"called its head 0 times.*expected one call"):
        supervised_logits(model, ROWS, **batch)


def test_the_online_teacher_is_frozen_in_eval_mode_and_without_gradient(batch):
    model = MODELS["gpt2"]()
    model.transformer.drop.p = 0.5
    model.train()
    teacher = OnlineTeacher(model)
    first, second = (logits_in_torch(teacher(ROWS, **batch)) for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    torch.testing.assert_close(first, model(**batch).logits.flatten(0, 1)[ROWS])
    assert not first.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())
