"""Imports run down only, and `import sadkern` needs torch alone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sadkern

ROOT = Path(sadkern.__file__).parent

# Highest first. What stands on one floor does not see its neighbours, unless it is one package.
FLOORS = [
    ["cli"],
    ["demo"],
    ["plan"],
    ["train", "evaluate", "inspect"],
    ["teacher", "curriculum"],
    ["data", "store", "forward"],
    ["span_kl", "topk", "spans"],
    ["ops"],
    ["projection", "sampling"],
    ["backends", "reduction", "tiles"],
    ["ranks", "dtensors"],
    ["sides"],
    ["files", "_C", "_version"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
KERNEL_HALF = {
    *("span_kl", "topk", "ops", "projection", "sampling", "backends"),
    *("reduction", "tiles", "ranks", "dtensors", "sides", "_C"),
}
ALLOWED = {
    "transformers": {"train", "teacher", "evaluate", "inspect", "plan", "demo"},
    "triton": set(),
}


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found: set[str] = set()
    package = ["sadkern", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


FILES = {path: imports(path) for path in sorted(ROOT.rglob("*.py"))}


def own(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_the_floors_are_drawn_as_they_are():
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    drawn = text.partition("```text\n")[2].partition("```")[0].splitlines()
    assert [set(line[:43].split()) for line in drawn] == [set(floor) for floor in FLOORS]


def test_every_module_has_a_floor():
    assert {own(path) for path in FILES} - {"__init__"} == set(FLOOR) - {"_C"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down_only(path):
    name = own(path)
    for module in FILES[path]:
        top, *rest = module.split(".")
        if top == "sadkern" and name != "__init__":
            target = rest[0] if rest[0] in FLOOR else "__init__"
            if target == "__init__":  # a public name: from the top, as users do
                assert name == "cli" or rest[0] == "__version__", module
            else:
                assert target == name or FLOOR[target] > FLOOR[name], module
            assert not (name == "spans" and target in KERNEL_HALF), module
            assert not (name in KERNEL_HALF and target == "spans"), module
        if top in ALLOWED:
            triton_backend = top == "triton" and ROOT / "backends" / "triton" in path.parents
            assert name in ALLOWED[top] or triton_backend, f"{module} in {name}"


def test_import_sadkern_brings_torch_and_nothing_else():
    """And works where nothing but torch is installed."""
    script = """
import importlib.machinery, json, sys
class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.split(".")[0] in sys.argv[1:]
        return None if absent else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Installed
import torch
before = set(sys.modules)
import sadkern
print(json.dumps(sorted(set(sys.modules) - before)))
logits = torch.zeros(1, 2)
assert sadkern.span_kl(logits, logits, torch.ones(1, dtype=torch.long)).loss == 0
"""
    absent = "transformers triton typer rich matplotlib tokenizers accelerate tqdm".split()
    done = subprocess.run(
        [sys.executable, "-c", script, *absent], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not names - {"torch", "sadkern", "numpy", *sys.stdlib_module_names}


def test_public_names():
    assert set(sadkern.__all__) == {
        "Projection", "SpanLoss", "TopK", "sample_logprobs", "span_kl", "topk_logprobs",
        "__version__", "build_info",
    }  # fmt: skip
    assert (ROOT / "py.typed").exists()
