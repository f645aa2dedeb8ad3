"""What bench.gpu can show without a GPU: its plan, its refusal, its numbers, its files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from bench.common import ROOT
from bench.formulas import assert_as_precise
from bench.gpu import __main__ as gpu
from bench.gpu import cases, checks, choosing, report, timing
from bench.gpu.cases import Case
from bench.gpu.checks import Check, Scope
from sadkern.span_kl import DIVERGENCES

CPU = torch.device("cpu")
TINY = Scope(
    vocabs=(37,), dtypes=(torch.float32, torch.bfloat16), kinds=("random", "banned"),
    divergences=("forward_kl", "jsd", "skew_reverse_kl"), rows=6, k=5, most=(4,),
)  # fmt: skip
FP32 = torch.float32
CASES = (
    Case("logits", 6, 64, "forward_kl", dtype=FP32),
    Case("logits", 6, 65, "jsd", dtype=FP32),
    Case("projection", 10, 40, widths=(8, 12), supervised=0.4, dtype=FP32),
    Case("topk-teacher", 6, 64, k=5, dtype=FP32),
    Case("topk", 6, 64, k=4, dtype=FP32),
)


pytestmark = pytest.mark.usefixtures("one_thread")


def command(*arguments: str):
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *arguments], cwd=ROOT, capture_output=True, text=True
    )


class FakeClock:
    """Everyone takes 2 ms and 1 MiB, sadkern, whose turn is always first, half of that."""

    def __init__(self, contestants: int, free: int = 1 << 40):
        self.turn, self.contestants, self.room = -1, contestants, free

    def seconds(self, run):
        run()
        self.turn += 1
        return 1e-3 if self.turn % self.contestants == 0 else 2e-3

    def peak(self, run):
        run()
        return 1 << 20

    def free(self):
        return self.room


# The plan, and the refusal.


def test_a_dry_run_lists_everything_and_needs_no_gpu():
    done = command("--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "V = 37, 5001, 32000, 151936" in lines[0]
    assert "float32, bfloat16, float16; random, near, banned rows" in lines[0]
    for divergence in DIVERGENCES:
        for part in ("logits", "projection", "topk-teacher"):
            assert any(line.startswith(f"  {part}: {divergence}, ") for line in lines)
    for check in ("topk: selection", "logits: determinism", "waiting: projection"):
        assert any(line.startswith(f"  {check}") for line in lines)
    timed = [line.partition(", bfloat16")[0] for line in lines if "bytes): sadkern; " in line]
    wide, long = "(8192, 32000)", "(2048, 128256)"
    assert timed == [
        *(f"logits: {name} {shape}" for shape in (wide, long) for name in ("forward_kl", "jsd")),
        f"projection: forward_kl {wide}, D = 4096 from 5120, 40% supervised",
        "projection: forward_kl (8192, 128256), D = 4096 from 4096, 40% supervised",
        *(f"topk-teacher: forward_kl {x}, K = {k}" for x in (wide, long) for k in (64, 256)),
        *(f"topk: {x}, K = {k}" for x in (wide, long) for k in (32, 256)),
    ]


def test_a_dry_run_needs_neither_triton_nor_the_peers():
    code = (
        "import sys\n"
        "for name in ('triton', 'liger_kernel', 'trl'): sys.modules[name] = None\n"
        "from bench.gpu import __main__ as gpu\n"
        "print(gpu.main(['--dry-run', '--only', 'logits', '--only', 'topk', '--quick']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.pop() == "0"
    assert {line.partition(":")[0] for line in lines} == {"logits", "topk"}
    assert "torch.compile" not in done.stdout
    assert "Liger (not installed)" in lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the command would use it")
def test_without_a_gpu_it_says_what_is_needed():
    done = command("--only", "topk")
    assert done.returncode == 2
    for said in ("no NVIDIA GPU", torch.__version__, "compute capability 8.0", "--dry-run"):
        assert said in done.stderr


def test_it_asks_for_parts_that_exist():
    done = command("--only", "everything", "--dry-run")
    assert done.returncode == 2
    assert "topk-teacher" in done.stderr


# Numbers.


@pytest.mark.parametrize(
    ("case", "per_logit"),
    [
        (Case("logits", 10, 100), 6),
        (Case("logits", 10, 100, "tvd"), 6),
        (Case("logits", 10, 100, dtype=FP32), 12),
        (Case("topk-teacher", 10, 100), 4),
        (Case("topk", 10, 100), 2),
    ],
    ids=str,
)
def test_bytes_that_a_kernel_must_move(case, per_logit):
    assert cases.bytes_moved(case) == 1000 * per_logit


def test_a_top_k_adds_its_ids_and_log_probabilities():
    assert cases.bytes_moved(Case("topk", 10, 100, k=3)) == 1000 * 2 + 10 * 3 * 8


def test_memory_that_a_case_needs():
    copied = 2 << 30
    assert Case("logits", 10, 100).needs == 3 * 2000 + copied
    assert Case("topk", 10, 100, k=3).needs == 2000 + 240 + copied
    case = Case("projection", 10, 100, widths=(4, 8))
    assert case.needs == 110 * 12 * 2 + 110 * 4 * 2 + 100 * 4 * 4 + (256 << 20) + copied


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA RTX A6000", "nvidia-rtx-a6000"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("Tesla (V100)/", "tesla-v100"),
    ],
)
def test_slug(name, folder):
    assert report.slug(name) == folder


def test_quartiles():
    assert report.quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == {
        "median_s": 3.0, "lower_quartile_s": 2.0, "upper_quartile_s": 4.0, "turns": 5,
    }  # fmt: skip


def timed(seconds, peak=None):
    one = {"median_s": seconds, "lower_quartile_s": seconds, "upper_quartile_s": 2 * seconds}
    return one if peak is None else {**one, "peak_bytes": peak}


def made_up(**more):
    row = {
        "part": "logits",
        "case": "jsd (10, 100)",
        "backend": "triton",
        "bytes_moved": 3_000_000,
        "copied_bytes": 2_000_000,
        "contestants": {
            "sadkern": timed(0.004, 1 << 20),
            "eager": timed(0.01, 3 << 20),
            "Liger": {"absent": "liger_kernel is not installed"},
            "torch.compile": {"failed": "OutOfMemoryError: 1|2"},
        },
        "floors": {"copy": timed(0.002), "four GEMMs": timed(0.003)},
        **more,
    }
    return report.with_ratios(row)


def test_ratios():
    assert made_up()["ratios"] == {
        "time_of_ours": {"eager": 2.5},
        "memory_of_ours": {"eager": 3.0},
        "copy_bytes_per_s": 1e9,
        "of_copy_bandwidth": 0.75,
        "of_gemm_floor": 0.75,
    }
    without_ours = made_up(contestants={"sadkern": {"failed": "x"}, "eager": timed(1.0, 1)})
    assert without_ours["ratios"] == {
        "time_of_ours": {}, "memory_of_ours": {}, "copy_bytes_per_s": 1e9,
    }  # fmt: skip


def test_markdown():
    results = {
        "date": "2000-01-01",
        "hardware": {"gpu": "GPU X", "driver": "1.2"},
        "versions": {"torch": "3.4"},
        "correctness": {
            "run": 3,
            "failed": [{"part": "topk", "name": "a check", "why": "too far"}],
            "backends": ["triton on cuda"],
            "refused": {"native": "no compiler"},
        },
        "cases": [made_up()],
        "skipped": [{"case": "topk: (1, 2)", "why": "its part failed a check"}],
    }
    assert report.markdown(results).splitlines() == [
        "# GPU X",
        "",
        "`python -m bench.gpu`, 2000-01-01: driver 1.2, torch 3.4.",
        "",
        *report.EXPLAINED,
        "",
        "2 of 3 checks passed (backends: triton on cuda).",
        "- not checked: native, no compiler",
        "- FAILED topk: a check: too far",
        "",
        "Timed is sadkern's backend triton.",
        "",
        "## Logits in, loss and gradient of the logits out",
        "",
        "| case | eager | Liger | torch.compile | of copy bandwidth | of the four GEMMs "
        "| sadkern, ms | copy, GB/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| jsd (10, 100) | 2.5x | absent | failed | 75% | 75% | 4 | 1 |",
        "",
        "| case |  | ms | quartiles | extra MiB | memory, of sadkern's |  |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| jsd (10, 100) | sadkern | 4 | 4 to 8 | 1 |  |  |",
        "| jsd (10, 100) | eager | 10 | 10 to 20 | 3 | 3.0x |  |",
        "| jsd (10, 100) | Liger | absent |  |  |  | liger_kernel is not installed |",
        "| jsd (10, 100) | torch.compile | failed |  |  |  | OutOfMemoryError: 1\\|2 |",
        "| jsd (10, 100) | copy | 2 | 2 to 4 |  |  |  |",
        "| jsd (10, 100) | four GEMMs | 3 | 3 to 6 |  |  |  |",
        "",
        "## Left out",
        "",
        "- topk: (1, 2): its part failed a check",
    ]


# Correctness, on CPU tensors: Triton's kernels run in its interpreter.


def test_every_check_runs_and_passes():
    on, refused = checks.serving(CPU)
    names = [name for name, _ in on]
    assert {"reference", "triton"} <= set(names)
    assert set(names) | set(refused) == {"reference", "native", "triton", "cuda"}
    parts = set()
    for check in checks.checks(TINY, on):
        check.run()
        parts.add(check.part)
    assert parts == {*cases.PARTS, checks.WAITING}


def test_a_wrong_result_is_refused():
    exact = torch.tensor([1.0, 4.0, torch.inf], dtype=torch.float64)
    plain, eps = exact.float() + 1e-5, torch.finfo(FP32).eps
    assert_as_precise(plain + 0.9e-5, exact, plain)
    with pytest.raises(AssertionError, match=r"result: error 3\.0\de-05, PyTorch's 1\.0\de-05"):
        assert_as_precise(plain + 2e-5, exact, plain)
    assert_as_precise((exact + 3.9 * eps).float(), exact, exact)
    with pytest.raises(AssertionError, match="not as infinite"):
        assert_as_precise(torch.tensor([1.0, 4.0, 5.0]), exact, plain)
    with pytest.raises(AssertionError, match="error nan"):
        assert_as_precise(torch.tensor([torch.nan, 4.0, torch.inf]), exact, plain)


# What auto chooses.


def test_what_was_timed_of_both_is_remembered(tmp_path):
    def case(part, triton, cuda, **shape):
        found = {"sadkern, triton": triton, "sadkern, cuda": cuda}
        return {"part": part, "shape": {"vocab": 32000, **shape}, "contestants": found}

    results = {
        "hardware": {"gpu": "GPU X", "compute_capability": "8.6"},
        "cases": [
            case("logits", timed(0.004), timed(0.003), divergence="jsd"),
            case("logits", timed(0.004), {"failed": "x"}, divergence="tvd"),
            case("topk", timed(0.001), timed(0.002), divergence="forward_kl"),
            {"part": "projection", "shape": {}, "contestants": {"sadkern": timed(1.0)}},
        ],
    }
    old = {"gpu": "GPU X", "kernel": "jsd"}, {"gpu": "GPU Y", "kernel": "jsd"}
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(old))
    assert choosing.remember(results, path) == 2
    common = {"gpu": "GPU X", "capability": [8, 6], "vocab": 32000}
    assert json.loads(path.read_text()) == [
        old[1],
        {**common, "kernel": "jsd", "triton_s": 0.004, "cuda_s": 0.003},
        {**common, "kernel": "topk", "triton_s": 0.001, "cuda_s": 0.002},
    ]


# Timing.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contestants_compute_the_same(case, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    contest = cases.contest(case, CPU)
    assert set(contest.makers) - set(cases.FLOORS) == set(cases.contestants(case.part))
    found = {}
    for name, make in contest.makers.items():
        if name in cases.FLOORS or cases.missing(name) or name == "sadkern, cuda":
            continue  # (which serves no CPU)
        if name.startswith("Liger") and case.part == "logits":
            continue  # a kernel that is compiled, for a GPU
        contest.reset()
        make()()
        found[name] = [leaf.grad for leaf in contest.leaves]
    for grads in found.values():
        torch.testing.assert_close(grads, found["sadkern"], atol=1e-6, rtol=1e-4)


def test_all_of_it_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(cases, "missing", lambda name: {"L": "liger", "T": "trl"}.get(name[0]))
    row = timing.measure(CASES[2], CPU, FakeClock(6), seconds=0)
    assert row["contestants"]["sadkern"] == {
        "peak_bytes": 1 << 20, "median_s": 1e-3, "lower_quartile_s": 1e-3,
        "upper_quartile_s": 1e-3, "turns": timing.LEAST,
    }  # fmt: skip
    assert row["contestants"]["Liger, rows"] == {"absent": "liger is not installed"}
    assert row["ratios"]["of_gemm_floor"] == 2.0
    assert set(row["ratios"]["time_of_ours"].values()) == {2.0}

    scope = TINY._replace(divergences=("forward_kl",), dtypes=(FP32,))
    work = gpu.Work(scope=scope, cases=CASES, seconds=0)
    console = Console(file=(tmp_path / "said").open("w"), width=200)
    assert gpu.run(work, CPU, FakeClock(10**6), tmp_path / "x", console) == 0
    results = json.loads((tmp_path / "x" / "gpu.json").read_text())
    assert set(results) == {
        "date", "hardware", "versions", "seconds_per_case", "correctness", "cases", "skipped",
    }  # fmt: skip
    assert {"torch", "triton", "CUDA", "liger-kernel", "trl"} == set(results["versions"])
    assert results["correctness"]["run"] > 10
    assert results["correctness"]["failed"] == results["skipped"] == []
    assert [row["part"] for row in results["cases"]] == [case.part for case in CASES]
    for row in results["cases"]:
        assert set(row) == {
            "part", "case", "shape", "backend", "tiles_on_chip", "bytes_moved", "copied_bytes",
            "contestants", "floors", "ratios",
        }  # fmt: skip
        assert ("of_copy_bandwidth" in row["ratios"]) == (row["part"] != "projection")
    assert "## Selection" in (tmp_path / "x" / "gpu.md").read_text()
    assert (tmp_path / "x" / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_who_fails_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory\nin two lines")

    monkeypatch.setattr(cases, "eager", fails)
    monkeypatch.setattr(cases, "missing", lambda _: None)
    row = timing.measure(CASES[0], CPU, FakeClock(2), 0, left_out=("torch.compile", "Liger"))
    assert row["contestants"]["eager"] == {"failed": "RuntimeError: out of memory"}
    assert row["contestants"]["sadkern"]["median_s"] == 1e-3

    wrong = [Check("topk", "selection", lambda: fails()), Check("waiting", "none", lambda: None)]
    monkeypatch.setattr(checks, "checks", lambda *_: iter(wrong))
    work = gpu.Work(parts=("correctness", "topk", "topk-teacher"), cases=CASES, seconds=0)
    console = Console(file=(tmp_path / "said").open("w"), width=200)
    assert gpu.run(work, CPU, FakeClock(1, free=0), tmp_path, console) == 1
    console.file.close()
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["correctness"]["failed"] == [
        {"part": "topk", "name": "selection", "why": "RuntimeError: out of memory"}
    ]
    assert results["skipped"] == [
        {
            "case": "topk-teacher: forward_kl (6, 64), K = 5",
            "why": "needs 2.0 GiB of GPU memory, 0.0 are free",
        },
        {"case": "topk: (6, 64), K = 4", "why": "its part failed a check"},
    ]
    assert "FAILED topk: selection" in (tmp_path / "said").read_text()
