"""A training loop without logits: from both models' hidden states, or from a cached top-k teacher.

    python examples/hidden_states.py              # the teacher's hidden states and head
    python examples/hidden_states.py --top-k 32   # its 32 most likely tokens, computed once

Neither model's logits exist for more than some rows at a time, and for none that is not trained on.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sadkern import Projection, span_kl, topk_logprobs

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--top-k", type=int, default=0, help="tokens of the teacher; 0: all of them")
options = parser.parse_args()

torch.manual_seed(0)
V, ROWS, TOKENS = 2000, 4, 64


def model(width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=V, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def projection(model: LlamaForCausalLM, input_ids: torch.Tensor) -> Projection:
    """The model's logits as what they are made of: its backbone's output and its head."""
    return Projection(model.model(input_ids).last_hidden_state, model.lm_head.weight)


teacher, student = model(128, 4).eval().requires_grad_(False), model(64, 2)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)

input_ids = torch.randint(V, (ROWS, TOKENS))
# A prompt of 16 tokens, a thought of 32, an action of 15; the last row predicts nothing.
span_ids = torch.tensor([0] * 16 + [1] * 32 + [2] * 15 + [0]).expand(ROWS, -1)

signal = projection(teacher, input_ids)
if options.top_k:
    signal = topk_logprobs(signal, options.top_k)
    tail = signal.tail_mass[span_ids != 0].mean()
    print(f"{options.top_k} tokens leave out {tail:.1%} of the teacher's probability")

for step in range(61):
    out = span_kl(projection(student, input_ids), signal, span_ids)
    out.loss.backward()  # into the backbone through its hidden states, and into the tied head
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        reason, act = out.span_loss.tolist()
        print(f"step {step:2}: KL of thoughts {reason:.3f}, of actions {act:.3f} nats per token")
