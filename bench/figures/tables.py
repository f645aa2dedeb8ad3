"""Tables of README and docs, each made of a file of results alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.common import ROOT, table
from bench.reproduce import tables as study

GIB = 2**30
LOGITS = "pytest bench/bench_logits.py --benchmark-enable --record"
PROJECTION = "pytest bench/bench_projection.py --benchmark-enable --record"
TRAIN = "pytest bench/bench_train.py --benchmark-enable --record"
GPU = "python -m bench.gpu"
H200 = "bench/results/nvidia-h200/gpu.json"


def results(name: str) -> Any:
    """What a benchmark kept, by the name of its file."""
    path = ROOT / (name if "/" in name else f"bench/results/{name}.json")
    return json.loads(path.read_text())


def rows_of(name: str, number: int = 0) -> list[dict[str, Any]]:
    """Of the table of that number."""
    return list(results(name)["tables"].values())[number]


def times(value: float) -> str:
    return f"{value:.0f}x" if value >= 20 else f"{value:.1f}x"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def demo() -> Iterator[list[str]]:
    found = results("demo")
    before, after = found["before"], found["after"]
    names = {
        "reason_kl": ("KL to the teacher, [REASON], nats a token", "{:.3f}", "0.000"),
        "act_kl": ("KL to the teacher, [ACT], nats a token", "{:.3f}", "0.000"),
        "cot_match": ("CoT match with the teacher", "{:.1%}", "100.0%"),
        "action_accuracy": ("action accuracy", "{:.1%}", "{:.1%}"),
    }
    yield ["", "before", "after", "teacher"]
    for name, (said, form, teacher) in names.items():
        own = teacher.format(after["teacher_action_accuracy"])
        yield [said, form.format(before[name]), form.format(after[name]), own]


def logits() -> Iterator[list[str]]:
    yield ["dtype", "(N, V)", "faster than eager", "than `torch.compile`", "of copy bandwidth"]
    for row in rows_of("bench_logits"):
        ratios = times(row["x eager"]), times(row["x torch.compile"])
        yield [row["dtype"], row["(N, V)"], *ratios, percent(row["of copy"])]


def divergences() -> Iterator[list[str]]:
    found: dict[str, dict[str, float]] = {}
    for row in rows_of("bench_logits", 1):
        found.setdefault(row["divergence"], {})[row["dtype"]] = row["time / forward_kl's"]
    yield ["divergence", "float32", "bfloat16"]
    for name, ratio in found.items():
        yield [name, f"{ratio['float32']:.2f}", f"{ratio['bfloat16']:.2f}"]


CONTESTANTS = {
    "sadkern": "sadkern",
    "chunk_rows=176": "sadkern, `chunk_rows=176`",
    "eager": "PyTorch, all rows",
    "eager, rows": "PyTorch, rows",
    "Liger": "Liger `LigerFusedLinearJSDLoss(beta=0)`",
    "TRL, rows": "TRL `ChunkedDivergenceFunction`, rows",
    "four GEMMs": "four GEMMs",
}


def projection() -> Iterator[list[str]]:
    found: dict[str, list[str]] = {name: [] for name in CONTESTANTS}
    workloads = list(dict.fromkeys(row["N x V"] for row in rows_of("bench_projection")))
    for row in rows_of("bench_projection"):
        time, memory = f"{row['seconds']:.2f} s", ""
        if "extra MiB" in row:
            memory = f"{row['extra MiB']:.0f} MiB"
        if row["contestant"] != "sadkern":
            time += f", {times(row['time / ours'])}"
            memory += f", {times(row['memory / ours'])}" if memory else ""
        found[row["contestant"]] += [time, memory]
    yield ["", *(x for workload in workloads for x in (f"{workload}: time", "extra memory"))]
    for name, cells in found.items():
        yield [CONTESTANTS[name], *cells]


def grad_filter() -> Iterator[list[str]]:
    yield ["`grad_filter_eps`", "time, of the four GEMMs'", "of dhidden missing", "of dweight"]
    for row in rows_of("bench_grad_filter"):
        missing = (f"{100 * row[f'missing of {name}']:.1f} %" for name in ("dhidden", "dweight"))
        yield [row["grad_filter_eps"], f"{row['of four GEMMs']:.2f}", *missing]


def topk() -> Iterator[list[str]]:
    yield [
        "dtype", "(N, V, K)", "`topk_logprobs`, faster than torch", "loss, faster than torch",
        "than to full logits",
    ]  # fmt: skip
    for row, loss in zip(rows_of("bench_topk"), rows_of("bench_topk", 1), strict=True):
        ratios = (row["x torch"], loss["x torch"], loss["x full logits"])
        yield [row["dtype"], row["(N, V, K)"], *map(times, ratios)]


def plan(found: Sequence[dict[str, Any]] | None = None) -> Iterator[list[str]]:
    """Of what `bench.plan` found, or what it kept."""
    rows = results("plan")["rows"] if found is None else found
    others = next(list(row["others"]) for row in rows if "others" in row)
    yield ["13B -> 7B", "a card's batch", "planned", "tracked", *others]
    for row in rows:
        sizes = [row, *(row.get("others", {}).get(name, {}) for name in others)]
        told = [f"{size['tracked'] / GIB:.1f}" if size else "" for size in sizes]
        shape = f"{row['batch']} x {row['seq_len']}"
        yield [row["way"], shape, f"{row['planned'] / GIB:.1f}", *told]


SHORT = (0, 1, 3, 5, 8, 9, 14)


def plan_short() -> Iterator[list[str]]:
    """One of each way, and those with other libraries beside them."""
    head, *rows = plan()
    yield head
    yield from (rows[number] for number in SHORT)


def gpu_case(part: str, case: str) -> dict[str, dict[str, float]]:
    """Its contestants."""
    return next(
        one["contestants"]
        for one in results(H200)["cases"]
        if one["part"] == part and one["case"].startswith(case)
    )


def gpu() -> Iterator[list[str]]:
    columns = ("eager", "torch.compile", "Liger", "TRL")
    yield ["", *columns, "extra memory of eager"]
    for one in results(H200)["cases"]:
        ours = one["contestants"]["sadkern"]
        told = []
        for name in columns:
            other = one["contestants"].get(name) or one["contestants"].get(f"{name}, rows")
            told.append(times(other["median_s"] / ours["median_s"]) if other else "")
        eager = one["contestants"].get("eager") or one["contestants"]["torch.topk + logsumexp"]
        if "eager" not in one["contestants"]:
            told[0] = times(eager["median_s"] / ours["median_s"])
        yield [
            f"{one['part']}: {one['case']}",
            *told,
            times(eager["peak_bytes"] / ours["peak_bytes"]),
        ]


REAL = "bench/results/real_model.txt"


def real_model() -> Iterator[list[str]]:
    yield ["span", "KL before", "after", "agreement before", "after"]
    line = re.compile(r"(reason|act) +KL (\S+) -> (\S+) nats / token, agreement (\S+) -> (\S+)")
    for span, *told in line.findall((ROOT / REAL).read_text()):
        yield [span.upper(), *told]


def peers() -> Iterator[list[str]]:
    """The README's: a line a job, and where each line is from."""
    yield ["", "PyTorch", "`torch.compile`", "TRL", "Liger", "how"]
    first = rows_of("bench_logits")[0]
    how = "[`{}`](docs/benchmarks.md#logits-in-loss-and-gradient-out)"
    how = how.format(LOGITS.removesuffix(" --record"))
    named = f"logits {first['(N, V)']}, {first['dtype']}, CPU"
    yield [named, times(first["x eager"]), times(first["x torch.compile"]), "", "", how]
    found = {row["contestant"]: row for row in rows_of("bench_projection")[:7]}
    how = "[`{}`](docs/benchmarks.md#hidden-states-in-gradients-of-hidden-states-and-head-out)"
    how = how.format(PROJECTION.removesuffix(" --record"))
    for said, key in (("hidden states, CPU", "time"), ("the same, memory", "memory")):
        ratios = [
            times(found[name][f"{key} / ours"]) for name in ("eager, rows", "TRL, rows", "Liger")
        ]
        yield [f"{said}, N x V = {found['sadkern']['N x V']}", ratios[0], "", *ratios[1:], how]
    steps = {row["contestant"]: row["a step in SADTrainer's"] for row in rows_of("bench_train")}
    how = f"[`{TRAIN.removesuffix(' --record')}`](docs/training.md#memory-and-time)"
    by_hand, trl = (f"{steps[name]:.2f}x" for name in ("loop by hand", "TRL GKDTrainer"))
    yield ["a step of training, CPU", by_hand, "", trl, "", how]
    how = f"[`{GPU}`](bench/results/nvidia-h200/gpu.md)"
    for part, case, said in (
        ("logits", "forward_kl (8192, 32000)", "logits (8192, 32000), bf16, NVIDIA H200"),
        ("topk-teacher", "forward_kl (8192, 32000), K = 64", "the same to a top-64 teacher"),
        ("projection", "forward_kl (8192, 32000)", "hidden states, 40 % of 8192 rows, V = 32000"),
    ):
        one = gpu_case(part, case)
        for key in ("median_s", "peak_bytes")[: 2 if part == "projection" else 1]:
            cells = []
            for name in ("eager", "torch.compile", "TRL", "Liger"):
                other = one.get(f"{name}, rows") or one.get(name)
                cells.append(times(other[key] / one["sadkern"][key]) if other else "")
            yield [said if key == "median_s" else "the same, memory", *cells, how]


def reproduce(rows: Callable[[Any], Iterator[list[str]]]) -> Callable[[], Iterator[list[str]]]:
    return lambda: rows(results("reproduce"))


class Table(NamedTuple):
    rows: Callable[[], Iterator[list[str]]]
    file: str
    command: str


TABLES = {
    "demo": Table(demo, "bench/results/demo.json", "make demo"),
    "logits": Table(logits, "bench/results/bench_logits.json", LOGITS),
    "divergences": Table(divergences, "bench/results/bench_logits.json", LOGITS),
    "projection": Table(projection, "bench/results/bench_projection.json", PROJECTION),
    "grad-filter": Table(
        grad_filter,
        "bench/results/bench_grad_filter.json",
        "pytest bench/bench_grad_filter.py --benchmark-enable --record",
    ),
    "topk": Table(
        topk,
        "bench/results/bench_topk.json",
        "pytest bench/bench_topk.py --benchmark-enable --record",
    ),
    "plan": Table(plan, "bench/results/plan.json", "python -m bench.plan --write"),
    "plan-short": Table(plan_short, "bench/results/plan.json", "python -m bench.plan --write"),
    "gpu": Table(gpu, H200, GPU),
    "real-model": Table(
        real_model, REAL, f"pytest -m slow python_tests/test_real_model.py -s > {REAL}"
    ),
    **{
        f"reproduce-{name}": Table(
            reproduce(rows),
            "bench/results/reproduce.json",
            "python -m bench.reproduce --output runs/reproduce --write",
        )
        for name, rows in (
            ("run", study.run),
            ("3", study.three),
            ("5", study.five),
            ("more", study.more),
            ("apart", study.apart),
        )
    },
    "peers": Table(peers, "bench/results", "the last column's"),
}


def drawn(name: str) -> str:
    """A table of `TABLES` in Markdown, and under it where it is from."""
    rows, file, command = TABLES[name]
    head, *lines = rows()
    text = "\n".join(table(head, lines))
    if name == "peers":
        return text
    return f"{text}\n\n`{command}`{conditions(file)}"


def conditions(file: str) -> str:
    """What a file of results was measured on and with, as far as it says."""
    if file.endswith(".txt"):
        return "; " + (ROOT / file).read_text().splitlines()[0]
    found = results(file)
    hardware = found.get("hardware", "")
    if isinstance(hardware, dict):
        hardware = hardware["gpu"]
    known = {
        name: version for name, version in found["versions"].items() if version != "not installed"
    }
    with_ = [f"{name} {version}" for name, version in known.items()]
    return "; " + ", ".join(filter(None, [hardware, *with_])) + "."
