"""The logits on which the precision rule is put to the test, ours and PyTorch's answers to them.

The rule, `bench.formulas.assert_as_precise`: a result is compared with the reference in float64 on
the same inputs. Its error may be twice that of the same formula in plain PyTorch at the inputs' own
precision, plus one unit of rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.formulas import divergence_of_logs
from sadkern import span_kl
from sadkern.span_kl import TAILS

BACKENDS = ["reference", "native", "triton"]
HALVES = [torch.bfloat16, torch.float16]
DIVERGENCES = {  # name -> (divergence, its parameter)
    "forward_kl": ("forward_kl", 0.0),
    "reverse_kl": ("reverse_kl", 0.0),
    "jsd": ("jsd", 0.5),
    "jsd_0.1": ("jsd", 0.1),
    "skew_forward_kl": ("skew_forward_kl", 0.1),
    "skew_reverse_kl": ("skew_reverse_kl", 0.1),
    "tvd": ("tvd", 0.0),
}
PAIRS = [  # a divergence and a tail
    (name, tail)
    for name in DIVERGENCES
    for tail in TAILS
    if (name, tail) != ("reverse_kl", "renormalize")  # is infinite and refused
]


def divergence_in_torch(student, teacher, name, mix):
    """[...]: what a user of PyTorch would write, autograd giving the gradient."""
    return divergence_of_logs(F.log_softmax(student, -1), F.log_softmax(teacher, -1), name, mix)


def plain(student, teacher, name, mix):
    """(value [N], gradient [N, V]) of `divergence_in_torch` in the inputs' dtype.

    Banned tokens are very unlikely there, not impossible: autograd makes NaN of -inf. Where half
    precision overflows or underflows, what fp32 says.
    """

    def at(dtype):
        least = torch.finfo(dtype).min / 4
        leaf = student.detach().to(dtype).clamp(min=least).requires_grad_()
        value = divergence_in_torch(leaf, teacher.to(dtype).clamp(min=least), name, mix)
        value.sum().backward()
        return value.detach(), leaf.grad

    if student.dtype not in (torch.bfloat16, torch.float16):
        return at(student.dtype)
    pairs = zip(at(student.dtype), at(torch.float32), strict=True)
    return tuple(torch.where(low.isfinite(), low.float(), high) for low, high in pairs)


def ours(student, teacher, name, mix, backend, **options):
    """(value [N], gradient [N, V]) of `span_kl`."""
    leaf = student.detach().clone().requires_grad_()
    ids = torch.ones(student.shape[:-1], dtype=torch.long)
    out = span_kl(
        leaf, teacher, ids, span_weights=(1.0,), reduction="sum", divergence=name, beta=mix,
        skew=mix, backend=backend, **options,
    )  # fmt: skip
    out.loss.backward()
    return out.per_token, leaf.grad


def logits(case, vocab, dtype, rows=64, seed=0):
    """(student, teacher) [rows, vocab] of a kind that has broken kernels before."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale):
        return scale * torch.randn(rows, vocab, generator=generator)

    s, t = normal(3), normal(3)
    if case == "near":
        s = t + normal(1e-3)
    elif case == "nearer":
        s = t + normal(1e-5)
    elif case == "equal":
        s = t.clone()
    elif case == "shifted":
        s = t + 3.25
    elif case == "huge":
        s, t = s + 1e4 * normal(1).sign(), t + 1e4 * normal(1).sign()
    elif case == "far":  # certain of a token, most often of different ones
        s, t = (1e4 * (2 * torch.rand(rows, vocab, generator=generator) - 1) for _ in range(2))
    elif case == "banned":
        banned = torch.rand(rows, vocab, generator=generator) < 0.3
        banned[:, 0] = False
        s, t = s.masked_fill(banned, -torch.inf), t.masked_fill(banned, -torch.inf)
    elif case == "saturated":
        s[:, -1] += 60
        t[:, -1] += 60
    elif case == "opposed":  # each side certain of another token
        s[:, 0] += 60
        t[:, -1] += 60
    return s.to(dtype), t.to(dtype)


CASES = (
    "random", "near", "nearer", "equal", "shifted", "huge", "far", "banned", "saturated", "opposed",
)  # fmt: skip
