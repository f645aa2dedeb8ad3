"""A teacher's signal made small: its most likely tokens, or tokens drawn from it."""

from __future__ import annotations

import torch
from torch import Tensor

from sadkern import ops, sides
from sadkern.backends.kernels import MOST_TOKENS
from sadkern.sides import Projection, TopK


def topk_logprobs(
    source: Tensor | Projection,
    k: int,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> TopK:
    """The `k` most likely tokens of each row, their log-probabilities and what goes with them.

    One read of the logits gives the selection, the log-normaliser, the entropy and the mass of the
    tail, which is summed, not subtracted from 1. The most likely token comes first, equal logits in
    the order of their ids. No gradient flows through it.

    Args:
        source: logits `[..., V]`, fp32, bf16 or fp16 (fp64: on the reference backend), or a
            `Projection`, whose logits are made `chunk_rows` at a time.
        k: from 1 to V, at most 1024.
        temperature: divides the logits; log-probabilities, tail, entropy and lse are at it, and
            `span_kl` is to be given the same.
        chunk_rows: of a projection; None chooses by a byte budget.
        backend: as of `span_kl`.

    Returns:
        A `TopK`: ids int32 and logprobs `[..., k]`, tail_mass, entropy and lse `[...]`, in fp32
        (fp64 for fp64).

    Raises:
        ValueError: an argument that does not fit; on the CPU also a row without a finite
            log-normaliser (a NaN, nothing but -inf), which is named.
        RuntimeError: `backend` names one that is missing here.

    Example:
        >>> import torch
        >>> from sadkern import topk_logprobs
        >>> found = topk_logprobs(torch.tensor([[0.0, 3.0, 1.0, 3.0]]), 2)
        >>> found.ids.tolist(), round(found.tail_mass.item(), 4)
        ([[1, 3]], 0.0847)
    """
    _check(source, temperature, chunk_rows)
    vocab = sides.vocabulary(source)
    if not 1 <= k <= min(vocab, MOST_TOKENS):
        raise ValueError(
            f"k={k}: expected 1 to {min(vocab, MOST_TOKENS)} for a vocabulary of {vocab}"
        )
    found = TopK(*ops.topk(*sides.pack(source), k, temperature, chunk_rows, backend))
    return _finite(found)


def sample_logprobs(
    source: Tensor | Projection,
    n: int,
    *,
    temperature: float = 1.0,
    seed: int | None = None,
    chunk_rows: int | None = None,
) -> TopK:
    """`n` tokens drawn from each row, for random-sampling distillation.

    Drawn with replacement from softmax(logits / temperature); `logprobs` are the logarithms of
    weights, a token's share of the draws, whose mean over draws is its probability: the gradient
    of forward KL to them is that of the full distribution on average, where the top k alone would
    be biased. The value is not: on average it is larger, by what the draws lack in entropy. Weights
    sum to 1 and there is no tail, so `tail="none"` and `tail="bucket"` say the same of them.

    Args:
        source: as of `topk_logprobs`.
        n: draws per row.
        temperature: divides the logits.
        seed: None takes one from torch's own generator, so that `torch.manual_seed` governs.
        chunk_rows: rows whose distributions exist at a time; None chooses by a byte budget.

    Returns:
        A `TopK` of K = n: distinct ids, heaviest first, the rest filled up with -1 of weight 0;
        entropy and lse are the full distribution's.

    Raises:
        ValueError: as `topk_logprobs`.

    Example:
        >>> import torch
        >>> from sadkern import sample_logprobs
        >>> found = sample_logprobs(torch.tensor([[9.0, 0.0, 0.0]]), 4, seed=0)
        >>> found.ids.tolist(), found.logprobs.exp().tolist()
        ([[0, -1, -1, -1]], [[1.0, 0.0, 0.0, 0.0]])
    """
    _check(source, temperature, chunk_rows)
    if n < 1:
        raise ValueError(f"n={n}: expected a positive number of draws")
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    packed = sides.pack(source)
    return _finite(TopK(*ops.sample(*packed, n, temperature, seed, chunk_rows)))


def _check(source: Tensor | Projection, temperature: float, chunk_rows: int | None) -> None:
    sides.check("source", source)
    if isinstance(source, TopK):
        raise ValueError("source is a TopK, expected logits (a Tensor) or a Projection")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: expected a positive number")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows}: expected None or a positive number")


def _finite(found: TopK) -> TopK:
    lse = found.lse
    assert lse is not None
    if lse.device.type == "cpu" and not lse.isfinite().all():
        row = (~lse.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"source{row} has no distribution: log sum exp is {lse[tuple(row)].item()}, expected "
            "finite logits (or -inf, but not all of them)"
        )
    return found
