"""`span_kl` in a training loop of one's own: a model is distilled into a smaller one, in seconds.

    python examples/own_loop.py

Nothing here needs transformers but the two models; any module that gives logits will do.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sadkern import span_kl

torch.manual_seed(0)
V, ROWS, TOKENS = 2000, 4, 64


def model(width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=V, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


teacher, student = model(128, 4).eval(), model(64, 2)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)

input_ids = torch.randint(V, (ROWS, TOKENS))
# Of the rows: 0 for what is not trained on, 1 for thoughts, 2 for actions. Here a prompt of 16
# tokens, a thought of 32, an action of 15; the last row predicts nothing.
span_ids = torch.tensor([0] * 16 + [1] * 32 + [2] * 15 + [0]).expand(ROWS, -1)

with torch.no_grad():
    teacher_logits = teacher(input_ids).logits

for step in range(61):
    out = span_kl(
        student(input_ids).logits,
        teacher_logits,
        span_ids,
        span_weights=(1.0, 2.0),  # actions count double
        divergence="forward_kl",
        inplace=True,  # the gradient takes the logits' place: no third tensor of [..., V]
    )
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        reason, act = out.span_loss.tolist()
        print(f"step {step:2}: KL of thoughts {reason:.3f}, of actions {act:.3f} nats per token")
