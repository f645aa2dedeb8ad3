"""The build: what it leaves out, refuses and promises, with a compiler and without one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from sadkern import __version__, build_info

ROOT = Path(__file__).resolve().parents[1]
SETUP = ROOT / "setup.py"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

pytestmark = pytest.mark.skipif(not SETUP.exists(), reason="needs setup.py beside the tests")


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build the extension into a folder of its own."""
    environment = {"SADKERN_NATIVE": "auto", "SADKERN_CUDA": "0", **environment}
    into = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run(
        [sys.executable, str(SETUP), "-q", "build_ext", *into],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("build")
    done = build(folder, SADKERN_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout + done.stderr
    return folder


def test_what_is_shipped(tmp_path):
    """A wheel has the package and nothing else, data included; sources have what a build takes."""
    for name in ("sadkern", "csrc"):
        left_out = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    files = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "constraints.txt")
    for name in files:
        shutil.copy(ROOT / name, tmp_path)
    script = "import sys; from setuptools.build_meta import *; build_sdist('.'); build_wheel('.')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "SADKERN_NATIVE": "0", "SADKERN_CUDA": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    def sources(root, *folders):
        found = (path for folder in folders for path in (root / folder).rglob("*"))
        kept = (path for path in found if path.is_file() and path.suffix != ".pyc")
        return {str(path.relative_to(root)) for path in kept}

    package = {name for name in sources(ROOT, "sadkern") if not name.endswith(".so")}
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"sadkern-{__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == package
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {one.name.partition("/")[2] for one in opened.getmembers() if one.isfile()}
    assert package | sources(ROOT, "csrc") | set(files) <= held


def test_flags_keep_nan_and_run_anywhere(built):
    commands = (built / "temp" / "sadkern._C" / "build.ninja").read_text()
    assert "-O3" in commands
    for flag in ("-march=native", "-ffast-math", "-Ofast", "-ffinite-math-only"):
        assert flag not in commands


def test_no_function_of_one_instruction_set_can_replace_anothers(built):
    """Weak symbols are merged by the linker: one compiled for AVX-512 must not serve everyone."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    objects = sorted((built / "temp" / "sadkern._C").glob("*_*.o"))
    kernels = {"span_kl": "SpanKlArgs", "span_kl_topk": "SpanKlTopkArgs", "topk": "TopkArgs"}
    assert {f"{kernel}_baseline" for kernel in kernels} <= {path.stem for path in objects}
    for path in objects:
        arguments = kernels[path.stem.rpartition("_")[0]]
        listed = subprocess.run(
            ["nm", "--defined-only", "--extern-only", "-C", path],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        names = [line.split(maxsplit=2)[1:] for line in listed.splitlines()]
        names = [name for name in names if not name[1].startswith("DW.ref.")]  # only data
        assert names == [["T", f"sadkern::{path.stem}(sadkern::{arguments} const&, int)"]]


def test_the_core_includes_no_torch_header():
    for path in (path for path in (ROOT / "csrc").rglob("*.*") if path.parent.name != "cuda"):
        for header in re.findall(r"#include\s+[<\"](.+)[>\"]", path.read_text()):
            assert not re.match(r"(torch|ATen|c10|cuda)", header), path


def test_without_a_compiler_the_package_installs_all_the_same(tmp_path):
    done = build(tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0
    assert "run on its reference backend" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SADKERN_NATIVE": "1", "CXX": "no-such-compiler"}, "sadkern._C could not be built"),
        (
            {"SADKERN_NATIVE": "0", "SADKERN_CUDA": "1", "NVCC": "no-such", "CUDA_HOME": "/none"},
            "SADKERN_CUDA=1, but sadkern._cuda could not be built: there is no nvcc",
        ),
        ({"SADKERN_NATIVE": "yes"}, "SADKERN_NATIVE='yes': expected auto, 0 or 1"),
        ({"SADKERN_CUDA": "no"}, "SADKERN_CUDA='no': expected auto, 0 or 1"),
        ({"SADKERN_CHIPS": "86,75"}, "SADKERN_CHIPS='86,75': got 75, expected of 80, 86, 89, 90a"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path, environment, message):
    done = build(tmp_path, **environment)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("nvcc", ["no-such", "false"])
def test_without_a_working_nvcc_the_package_installs_all_the_same(nvcc, tmp_path):
    done = build(tmp_path, SADKERN_NATIVE="0", SADKERN_CUDA="auto", NVCC=nvcc, CUDA_HOME="/none")
    assert done.returncode == 0, done.stderr
    assert ("served by Triton alone" in done.stderr) is (nvcc == "false")
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("chips", "expected"),
    [("", ["80", "86", "89", "90a"]), ("86", ["86"]), ("80 90a", ["80", "90a"])],
)
def test_machine_code_is_made_for_the_chips_that_are_named(chips, expected, tmp_path):
    """And PTX for all others: as a compiler that only writes down its arguments is told."""
    nvcc, told = tmp_path / "nvcc", tmp_path / "told"
    nvcc.write_text(
        f'#!/bin/sh\necho "$@" >> {told}\n[ "$1" = --version ] && echo "release 13.0,"\n'
    )
    nvcc.chmod(0o755)
    build(tmp_path, SADKERN_NATIVE="0", CXX="true", NVCC=str(nvcc), SADKERN_CHIPS=chips,
          SADKERN_CUDA="1")  # fmt: skip
    commands = [line for line in told.read_text().splitlines() if "span_kl.cu" in line]
    assert len(commands) > 0
    for command in commands:
        assert re.findall(r"code=sm_(\w+)", command) == expected
        assert "code=compute_90 " in command


def test_the_core_can_be_left_out(tmp_path):
    done = build(tmp_path, SADKERN_NATIVE="0", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def test_without_the_core_the_reference_serves_and_says_so_once():
    done = python(
        """
import sys, warnings
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "sadkern._C":
            raise ImportError("no _C")
sys.meta_path.insert(0, Absent())
import torch
from sadkern import build_info, span_kl
assert set(build_info()) == {"native", "cuda"} and "missing (no _C)" in build_info()["native"]
s, t, ids = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    values = [span_kl(s, t, ids).loss.item() for _ in range(3)]
assert values == [values[0]] * 3 and abs(values[0] - 0.12011450) < 1e-7, values
assert [str(w.message) for w in caught] == [
    "sadkern runs on its slow reference backend: the compiled core is missing (no _C)"
], caught
try:
    span_kl(s, t, ids, backend="native")
except RuntimeError as error:
    print(error)
"""
    )
    assert done.returncode == 0, done.stderr
    assert "backend='native': the compiled core is missing (no _C)" in done.stdout
    assert "C++17 compiler" in done.stdout


needs_core = pytest.mark.skipif(not build_info().get("isas"), reason="needs the compiled core")


@needs_core
def test_build_info_says_what_was_built_and_chosen():
    info = build_info()
    assert info["native"] is True
    assert info["isas"][-1] == "baseline"
    assert info["isa"] in info["isas"]
    assert {"compiler", "openmp", "cuda"} <= set(info)


@needs_core
def test_the_environment_chooses_the_instruction_set():
    script = "from sadkern import build_info; print(build_info()['isa'])"
    assert python(script, SADKERN_ISA="baseline").stdout == "baseline\n"
    assert python(script, SADKERN_ISA="").stdout == f"{build_info()['isas'][0]}\n"
    done = python(script, SADKERN_ISA="mmx")
    assert done.returncode != 0
    assert "instruction set 'mmx' cannot run here; expected one of: " in done.stderr
