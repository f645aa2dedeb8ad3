"""Trajectories, a tokenizer of them and models small enough to be made in a moment."""

from __future__ import annotations

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

V = 300
PLACES = ("fridge", "cabinet 2", "sink", "garden", "drawer 11", "shelf", "oven", "table")
RECORDS = [
    {
        "id": f"mug-{i}",
        "text": f"Goal: cool a mug\nReasoning: The mug is near the {place}{', I think' * (i % 3)}."
        f"\nAction: go to {place}\nObservation: you see a mug.\n"
        + "Reasoning: Take it.\nAction: take mug\nObservation: done.\n"
        * (i % 2),
    }
    for i, place in enumerate(PLACES)
]


def small_tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    texts = [record["text"] for record in RECORDS]
    bpe.train_from_iterator(texts, vocab_size=V, special_tokens=["<end>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<end>"
    )


def small_model(
    seed: int, hidden: int = 16, vocab: int = V, scale: float = 1.0
) -> LlamaForCausalLM:
    """A Llama whose logits are spread by about `scale`, so that no distribution is flat."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden,
            num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256,
            pad_token_id=0, bos_token_id=None, eos_token_id=0,
        )
    )  # fmt: skip
    torch.nn.init.normal_(model.lm_head.weight, std=scale / hidden**0.5)
    return model
