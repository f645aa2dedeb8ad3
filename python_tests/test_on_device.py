"""What is done only for tensors on a GPU, as far as it can be held without one.

Operators run on meta tensors, which are on no CPU either and whose values nobody can look at: what
would make the host wait for a device is seen. Products that only CUDA has are stood in for.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from held import IDS, WEIGHTS, generator, in_dtype, make
from kernel_checks import check_gradients
from precision import DIVERGENCES
from torch.utils._python_dispatch import TorchDispatchMode

from sadkern import Projection, TopK, backends, ops, projection, sides, tiles
from sadkern.backends import reference
from sadkern.backends import triton as backend

ADDMM = torch.addmm


def addmm_with_out_dtype(added, a, b, *, out_dtype=None, beta, alpha, out):
    """torch.addmm on CUDA: products of half precision, summed up in fp32."""
    if out_dtype is None:
        return ADDMM(added, a, b, beta=beta, alpha=alpha, out=out)
    assert a.dtype == b.dtype
    assert a.dtype.itemsize == 2
    assert added.dtype == out.dtype == out_dtype == torch.float32
    return ADDMM(added, a.float(), b.float(), beta=beta, alpha=alpha, out=out)


@pytest.fixture
def halves_are_multiplied(monkeypatch):
    monkeypatch.setattr(tiles, "multiplies_halves", lambda device: True)
    monkeypatch.setattr(torch, "addmm", addmm_with_out_dtype)


@pytest.mark.usefixtures("halves_are_multiplied")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", ["projection", "topk"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_gradients_by_products_of_half_precision(name, teacher, dtype):
    """Logits in fp32 from operands as they are; of bf16 the gradient's tile is bf16 too."""
    s = make("projection", IDS.shape, 300, generator(1), width=32, dtype=dtype)
    t = make(teacher, IDS.shape, 300, generator(2), width=48, dtype=dtype)
    check_gradients(s, t, name, backend="triton")


@pytest.mark.usefixtures("halves_are_multiplied")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_of_tiles_and_their_gradient(dtype, monkeypatch):
    seen = set()
    original = backend.divergence_rows

    def spy(student, teacher, supervised, row_weights, labels, dstudent, **options):
        seen.add((student.dtype, teacher.dtype, dstudent.dtype, student is dstudent))
        return original(student, teacher, supervised, row_weights, labels, dstudent, **options)

    monkeypatch.setattr(backend, "divergence_rows", spy)
    s, t = (make("projection", IDS.shape, 40, generator(i), dtype=dtype) for i in (1, 2))
    check_gradients(s, t, "forward_kl", backend="triton")
    gradient = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    assert {x[:3] for x in seen} == {(torch.float32, torch.float32, gradient)}


def test_the_budget_counts_a_gradients_tile_of_its_own():
    rows, vocab = torch.arange(3000, device="meta"), 32000
    given = (reference, rows, vocab, 2, torch.float32, None, 64 << 20, torch.bfloat16)
    parts = list(projection.chunks(*given))
    for chunk, both, gradient in parts:
        assert gradient.shape == (len(chunk), vocab)
        assert gradient.dtype is torch.bfloat16
        entries = both.stride(0) * 2
        assert 4 * entries + 2 * entries // 2 <= 64 << 20
    assert sum(len(chunk) for chunk, _, _ in parts) == 3000


def test_tiles_grow_with_the_sums_that_every_chunk_reads_and_writes():
    sums = 4 * 128256 * 4096
    assert projection.tile_bytes("cuda") == projection.tile_bytes("cuda", 1 << 20) == 256 << 20
    assert projection.tile_bytes("cuda", sums) == sums // 2
    assert projection.tile_bytes("cpu", sums) == 64 << 20
    weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    hidden = torch.empty(5, 4096, dtype=torch.bfloat16, device="meta")
    side = Projection(hidden, weight)
    assert tiles.tiles_of(side, 128256, torch.float32, (None, weight, None)).summed_bytes == sums
    assert tiles.tiles_of(side, 128256, torch.float32).summed_bytes == 0


WAITS = {
    "aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default",
    "aten.equal.default", "aten.is_nonzero.default", "aten.unique2.default",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        given = [x for x in torch.utils._pytree.tree_leaves((arguments, options))
                 if isinstance(x, torch.Tensor)]  # fmt: skip
        out = function(*arguments, **options)
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        moved = "copy" in str(function) and len({x.device.type for x in given + made}) > 1
        places = arguments[1] if str(function).startswith(("aten.index.", "aten.index_put")) else []
        masked = any(x is not None and x.dtype is torch.bool for x in places)
        if str(function) in WAITS or masked or (moved and not options.get("non_blocking")):
            self.found.append(str(function))
        return out


def call(student, teacher, **changed):
    """`ops._span_kl` as `span_kl` calls it, on meta tensors; what then waited."""
    given = {
        "span_ids": IDS, "rows": IDS.flatten().nonzero().squeeze(-1), "token_weights": WEIGHTS,
        "labels": IDS.clone(), "num_tokens": torch.ones(2, dtype=torch.float64),
    }  # fmt: skip
    options = {
        **given, "span_weights": (1.0, 0.5), "divergence": "forward_kl", "mix": 0.0,
        "temperature": 1.5, "reduction_name": "span_mean", "ce_weight": 0.3, "tail": "bucket",
        "chunk_rows": 4, "grad_filter_eps": None, "group": None, **changed,
    }  # fmt: skip

    def there(x):
        return None if x is None else x.to("meta")

    def side(x):
        if isinstance(x, torch.Tensor):
            return there(x)
        if isinstance(x, TopK):
            return TopK(*map(there, vars(x).values()))
        return Projection(there(x.hidden), there(x.weight), there(x.bias), x.scale, x.softcap)

    options = {name: there(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    student, teacher = side(student), side(teacher)
    gradients = [torch.empty_like(x) for x in sides.slots(student) if x is not None]
    with Waits() as waits:
        outputs = ops._span_kl(backend, student, gradients, teacher, **options)
    assert all(x.device.type == "meta" for x in outputs)
    return waits.found


@pytest.fixture
def kernels_left_out(monkeypatch):
    launched = []

    class Left:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda **options: launched.append((self.name, grid, options))

    for name in ("span_kl", "span_kl_topk", "topk"):
        monkeypatch.setattr(getattr(backend, name), "kernel", Left(name))
    monkeypatch.setattr(backend.plans, "capability_of", lambda device: (8, 6))
    monkeypatch.setattr(backend.plans, "programs_on", lambda device, warps: 168)
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(tiles, "multiplies_halves", lambda device: True)
    monkeypatch.setattr(torch, "addmm", lambda *arguments, out, **options: out)
    return launched


@pytest.mark.parametrize("teacher", ["logits", "projection", "topk"])
@pytest.mark.parametrize("student", ["logits", "projection"])
def test_nothing_waits_for_the_device(student, teacher, kernels_left_out):
    s = make(student, IDS.shape, 40, generator(1), softcap=None)
    t = make(teacher, IDS.shape, 40, generator(2), width=9)
    both = (in_dtype(s, torch.bfloat16), in_dtype(t, torch.bfloat16))
    assert call(*both) == []
    kernels = {name for name, _, _ in kernels_left_out}
    assert kernels == {"span_kl_topk" if teacher == "topk" else "span_kl"}
    # All rows in one launch, or a chunk's; nothing is launched for what is not supervised.
    rows = sum(options["per_token"].numel() for _, _, options in kernels_left_out)
    logits = student == "logits" and teacher != "projection"
    assert rows == (IDS.numel() if logits else (IDS != 0).sum())


def test_what_waits_is_seen():
    """The places of supervised rows, where they are not handed over, must be counted."""
    s = make("projection", IDS.shape, 40, generator(1), softcap=None)
    with pytest.raises(Exception, match="nonzero"):
        call(s, s, rows=None)


def test_who_serves_a_gpu(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backend.plans, "capability_of", lambda device: (8, 6))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backends.choose("auto", dtype, cuda) is backends.backend("gpu")
        assert backends.choose("triton", dtype, cuda) is backend
    assert backends.choose("auto", torch.float64, cuda) is reference
    with pytest.raises(ValueError, match="backend='triton' takes float32, bfloat16, float16"):
        backends.choose("triton", torch.float64, cuda)
    with pytest.raises(RuntimeError, match="serves tensors on NVIDIA GPUs, got device cpu"):
        backends.choose("triton", torch.float32, torch.device("cpu"))
    monkeypatch.setattr(backend.plans, "capability_of", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"compute capability \(8, 0\) or higher, got \(7, 5\)"):
        backends.choose("triton", torch.float32, cuda)


def test_names_of_divergences_are_those_of_the_kernels():
    of = backend.span_kl.of
    kernels = {of.FORWARD_KL, of.REVERSE_KL, of.JSD, of.SKEW_FORWARD_KL, of.SKEW_REVERSE_KL, of.TVD}
    assert {x.value for x in kernels} == {name for name, _ in DIVERGENCES.values()}


def test_only_what_is_in_the_hosts_memory_is_pinned(monkeypatch):
    """Of hidden states that were read, beside a head that is on the device already."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    head = torch.zeros(4, 3, device="meta")
    found = sides.pinned(Projection(torch.zeros(2, 3), head))
    assert torch.equal(found.hidden, torch.ones(2, 3))
    assert found.weight is head
