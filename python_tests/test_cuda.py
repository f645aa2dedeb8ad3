"""The CUDA kernels against float64, run on the CPU by a shim: each of their threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_shim
import forked
import pytest
import torch
from kernel_checks import (
    LAYOUTS,
    any_layout,
    check_selection,
    check_ties,
    everything_at_once,
    far_rows,
    launched_where_tensors_are,
    precision_of_logits,
)
from precision import CASES, DIVERGENCES, HALVES, logits, ours

from sadkern import span_kl, topk_logprobs
from sadkern.backends import cuda, gpu, reference

pytestmark = [
    pytest.mark.skipif(cuda_shim.CXX is None, reason="needs g++"),
    pytest.mark.skipif(not cuda_shim.CSRC.exists(), reason="needs csrc beside the tests"),
]

BF16, FP16 = HALVES
# V, dtype. An odd V has rows that begin anywhere; of 33000 entries a row has two blocks.
WAYS = {"two warps": (1304, BF16), "ragged, fp16": (260, FP16), "odd": (257, BF16)}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """SADKERN_CUDA_SHIM: one that is built already."""
    given = os.environ.get("SADKERN_CUDA_SHIM")
    return Path(given) if given else cuda_shim.build(tmp_path_factory.mktemp("shim"))


@pytest.fixture(autouse=True)
def control(request, monkeypatch):
    """The kernels of the shim in place of those for chips."""
    if request.node.get_closest_marker("by_itself"):
        yield None
        return
    path = request.getfixturevalue("built")
    monkeypatch.setattr(cuda, "_CUDA", cuda_shim.load(path))
    control = cuda_shim.Control(path)
    yield control
    control.run_backwards(False)
    control.unwatch()


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_precision_of_logits(name, case, way):
    precision_of_logits("cuda", name, case, *way)


@pytest.mark.parametrize("vocab", [32000, 50257, 151936])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_precision_of_real_vocabularies(name, vocab):
    """By one block of 1024 threads, two and eight."""
    for case in ("random", "near"):
        precision_of_logits("cuda", name, case, vocab, BF16, rows=1)


@pytest.mark.parametrize("case", ["random", "banned", "near", "huge", "far", "saturated"])
def test_selection_and_its_sums(case, way):
    vocab, dtype = way
    x, _ = logits(case, vocab, dtype, rows=8)
    for k in (1, min(vocab, 100), min(vocab, 1024)):
        check_selection(x, k, topk_logprobs(x, k, backend="cuda"))


@pytest.mark.parametrize("vocab", [32000, 151936])
def test_selection_of_real_vocabularies(vocab):
    x, _ = logits("random", vocab, BF16, rows=1)
    for k in (64, 1024):
        check_selection(x, k, topk_logprobs(x, k, backend="cuda"))


@pytest.mark.parametrize(("vocab", "k"), [(5000, 1), (5000, 64), (5000, 1000), (33001, 64)])
def test_more_that_reach_the_bound_than_are_ranked(vocab, k):
    """Ties, and rows whose largest stand in the same vectors: the bound is found by bisection."""
    columns = torch.arange(vocab)
    x = torch.stack([
        torch.zeros(vocab),
        torch.full((vocab,), -torch.inf).masked_fill(columns == vocab - 1, 1.0),
        torch.where(columns % 512 < 264, 5.0 + columns / 999, columns / 999),
        -(columns % 7) / 1.0,
        torch.where(columns % 2 == 0, 0.0, -0.0),
    ]).to(BF16)  # fmt: skip
    x = x if vocab < 10000 else x[1:3]
    check_ties(x, k, topk_logprobs(x, k, backend="cuda"))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_labels_temperature_weights_and_padding(backwards, inplace, way, control):
    """In either order of threads."""
    control.run_backwards(backwards)
    everything_at_once("cuda", *way, "logits", inplace)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same(layout, dtype):
    any_layout("cuda", layout, dtype, topk=False)


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_that_end_within_a_vector(inplace):
    """What lies beyond them, between aligned rows, is neither looked at nor written."""
    s, t = logits("random", 301, BF16, rows=4)
    ids = torch.tensor([1, 2, 0, 1])
    expected = s.clone().requires_grad_()
    span_kl(expected, t, ids, divergence="jsd", backend="cuda").loss.backward()
    wide = [torch.nn.functional.pad(x, (0, 3), value=torch.nan) for x in (s, t)]
    leaf = wide[0][:, :301].detach()
    if inplace:
        span_kl(leaf, wide[1][:, :301], ids, divergence="jsd", inplace=True, backend="cuda")
        assert torch.equal(leaf, expected.grad)
        assert wide[0][:, 301:].isnan().all()
    else:
        leaf.requires_grad_()
        span_kl(leaf, wide[1][:, :301], ids, divergence="jsd", backend="cuda").loss.backward()
        assert torch.equal(leaf.grad, expected.grad)
    found = topk_logprobs(wide[1][:, :301], 300, backend="cuda")
    assert torch.equal(found.logprobs, topk_logprobs(t, 300, backend="cuda").logprobs)


def test_kernels_are_launched_where_their_tensors_are(monkeypatch):
    core = cuda.core()

    def watch(launching):
        def watched(kernel):
            return lambda **arguments: (launching(), getattr(core, kernel)(**arguments))

        kernels = {name: watched(name) for name in ("span_kl", "topk")}
        monkeypatch.setattr(cuda, "core", lambda: SimpleNamespace(**kernels))

    assert launched_where_tensors_are("cuda", monkeypatch, watch) == 2


def test_rows_beyond_two_to_the_31st_entry():
    far_rows("cuda")


@pytest.mark.parametrize("vocab", [320, 257, 32000, 33000])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_each_entry_is_read_once_and_written_once(name, vocab, control):
    """6 bytes a logit pair, and none of rows that are not supervised but their zeros."""
    rows = 7 if vocab < 1000 else 2
    s, t = logits("random", vocab, BF16, rows=rows)
    ids = torch.tensor([1, 0, 2, 2, 0, 0, 1])[:rows]
    leaf = s.clone().requires_grad_()
    watched = [control.watch(x) for x in (leaf.detach(), t)]
    control.traffic()
    out = span_kl(leaf, t, ids, divergence=name, backend="cuda")
    loaded, stored = control.traffic()
    supervised = (ids != 0).view(-1, 1).expand(-1, vocab)
    for counts in watched:
        assert torch.equal(counts.loads, supervised.to(torch.uint8))
        assert not counts.stores.any()
    pairs = int(supervised.sum())
    assert loaded == 4 * pairs
    assert stored == 2 * rows * vocab
    out.loss.backward()
    assert not leaf.grad[ids == 0].any()


def test_each_entry_is_written_once_in_place(control):
    s, t = logits("random", 304, BF16, rows=5)
    counts = control.watch(s)
    span_kl(s, t, torch.tensor([0, 1, 1, 0, 2]), inplace=True, backend="cuda")
    assert (counts.stores == 1).all()


@pytest.mark.parametrize("vocab", [320, 257, 33000])
def test_selection_reads_each_entry_once(vocab, control):
    x, _ = logits("random", vocab, BF16, rows=3)
    counts = control.watch(x)
    topk_logprobs(x, 20, backend="cuda")
    assert (counts.loads == 1).all()


def test_what_does_not_fit_is_refused():
    s, t = logits("random", 8 * 32768 + 8, BF16, rows=1)
    with pytest.raises(ValueError, match="rows of 262152 entries: this chip holds at most 262144"):
        ours(s, t, "forward_kl", 0.0, "cuda")
    s, t = logits("random", 1100, BF16, rows=1)
    with pytest.raises(ValueError, match="k=1025: expected at most 1024"):
        cuda.topk_rows(s, 1025, 1.0)
    with pytest.raises(ValueError, match="takes bfloat16, float16 logits, got"):
        ours(s.float(), t.float(), "forward_kl", 0.0, "cuda")
    with pytest.raises(ValueError, match="full teachers, got a TopK"):
        ours(s, topk_logprobs(t, 5, backend="cuda"), "forward_kl", 0.0, "cuda")


def rows(vocab, dtype=BF16):
    return torch.empty(2, vocab, dtype=dtype, device="meta")


def test_who_serves_where_nothing_was_measured(monkeypatch):
    monkeypatch.setattr(cuda, "longest", lambda device: 32768)
    table = {
        ("forward_kl", 32000): "triton",  # which keeps it, packed
        ("jsd", 20002): "triton",
        ("forward_kl", 20001): "cuda",  # which cannot be packed
        ("topk", 32000): "cuda",
        ("topk", 32770): "triton",  # of more than a block holds
        ("jsd", 50257): "triton",
    }
    for (kernel, vocab), expected in table.items():
        assert gpu.choice(kernel, rows(vocab))[0] == expected, (kernel, vocab)
    assert gpu.choice("topk", rows(2000), k=1025)[0] == "triton"
    assert gpu.choice("topk", rows(2000, torch.float32))[0] == "triton"
    monkeypatch.setattr(gpu.plans, "capability_of", lambda device: (9, 0))
    assert gpu.choice("topk", rows(32000)) == ("triton", "default")
    monkeypatch.setattr(cuda, "_CUDA", None)
    monkeypatch.setattr(cuda, "_import_error", "not there", raising=False)
    name, why = gpu.choice("topk", rows(32000))
    assert name == "triton"
    assert "were not built (not there)" in why


def test_who_was_faster_on_the_chip_serves(monkeypatch):
    def of(kernel, vocab, triton_s, cuda_s, capability=(8, 6)):
        return gpu.Measured("GPU X", capability, kernel, vocab, triton_s, cuda_s)

    monkeypatch.setattr(gpu, "measured", lambda: [
        of("jsd", 32000, 2.0, 1.0), of("jsd", 8000, 1.0, 2.0), of("topk", 32000, 1.0, 2.0),
        of("forward_kl", 32000, 2.0, 1.0, (8, 9)),
    ])  # fmt: skip
    monkeypatch.setattr(gpu.plans, "capability_of", lambda device: (8, 6))
    assert gpu.choice("jsd", rows(30000)) == ("cuda", "GPU X")
    assert gpu.choice("jsd", rows(9000)) == ("triton", "GPU X")
    assert gpu.choice("topk", rows(32000)) == ("triton", "GPU X")
    assert gpu.choice("forward_kl", rows(32000)) == ("triton", "default")  # of another chip
    assert gpu.choice("jsd", rows(30000, torch.float32))[0] == "triton"


@pytest.mark.parametrize("faster", ["triton", "cuda"])
def test_the_choice_is_who_computes(faster, monkeypatch, control):
    monkeypatch.setattr(gpu, "choice", lambda *arguments, **options: (faster, ""))
    s, t = logits("random", 304, BF16, rows=3)
    options = {"divergence": "jsd", "mix": 0.5, "temperature": 1.0, "ce_weight": 0.0}
    gradients = [torch.empty_like(s) for _ in range(2)]
    given = s, t, torch.tensor([True, False, True]), torch.ones(3), None
    control.traffic()
    got = gpu.divergence_rows(*given, gradients[0], **options)
    selected = gpu.topk_rows(s, 7, 1.0)
    assert (control.traffic() != (0, 0)) is (faster == "cuda")
    expected = reference.divergence_rows(*given, gradients[1], **options)
    torch.testing.assert_close(got.per_token, expected.per_token, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=1e-6)
    assert torch.equal(selected.ids, reference.topk_rows(s, 7, 1.0).ids)


def test_the_committed_table_can_be_read():
    for row in gpu.measured():
        assert row.capability >= (8, 0)
        assert row.triton_s > 0 < row.cuda_s


# File, what it says once, and what instead: each breaks what a test above must notice.
MUTATIONS = {
    "parts are added up too early": ("row.cuh", "__syncthreads();\n    // Of two", "// Of two"),
    "blocks do not wait for each other": ("row.cuh", "sync_cluster();\n#pragma", "\n#pragma"),
    "the teacher is not waited for": ("span_kl.cu", "wait_for_loads();\n", ";\n"),
    "the next row comes to another place": (
        "span_kl.cu", "if (more) load_vectors(i", "if (more) load_vectors(0",
    ),
    "a vector goes too far": ("row.cuh", "kEntries <= end) return load", "1 <= end) return load"),
    "an entry is left out": ("row.cuh", ">= end) break;\n    c", "> end - 2) break;\n    c"),
    "candidates are sorted too early": ("topk.cu", "sync_cluster();\n    return f", "return f"),
    "the sort does not wait": ("topk.cu", "}\n        __syncthreads();", "}\n"),
    "a tie too few": ("topk.cu", "trial - 1) < a_.k", "trial) < a_.k"),
}  # fmt: skip


@pytest.mark.by_itself
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_found(name, built, tmp_path):
    file, *change = MUTATIONS[name]
    broken = cuda_shim.broken(tmp_path, built, file, *change)
    done = forked.run(run_on, str(broken))
    assert done.returncode == 1, done.stdout[-2000:]
    assert "1 failed" in done.stdout.splitlines()[-1]


@pytest.mark.by_itself
def test_nothing_is_touched_that_is_not_ours(tmp_path):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    # (Beside the sanitizer what throws: it looks for that as it begins.)
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [cuda_shim.CXX, f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"needs {name}")
        libraries.append(found)
    built = cuda_shim.build(tmp_path, flags=cuda_shim.SANITIZE)
    chosen = "labels or vector or transposed or once or 5000 or (precision and (banned or opposed))"
    environment = {
        **os.environ,
        "SADKERN_CUDA_SHIM": str(built),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *these(chosen)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def these(chosen: str) -> list[str]:
    """Pytest's arguments for this file's tests, those `chosen`, until one fails; but none that
    start a process."""
    few = ["-m", "not by_itself", "-k", f"({chosen}) and not real"]
    return ["-x", "-q", "-p", "no:cacheprovider", __file__, *few]


def run_on(shim: str) -> None:
    os.environ["SADKERN_CUDA_SHIM"] = shim
    sys.exit(pytest.main(these("(forward_kl and random) or once or bound or vector")))
