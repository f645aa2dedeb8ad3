"""Builds `sadkern._C` with pybind11, OpenMP and ninja, and `sadkern._cuda` where there is nvcc;
everything else stands in pyproject.toml.

Nothing here imports torch: the kernels take addresses and sizes, so one build serves every torch.
Without a working C++17 compiler the package installs all the same, with the reference backend;
without nvcc, with no kernels of its own in CUDA. No GPU is needed to build them.

Environment
    CXX            the compiler (default: c++)
    NVCC           nvcc (default: that of the path, or of CUDA_HOME)
    SADKERN_NATIVE auto (default), 1 or 0: 1 makes a failing build an error, 0 leaves the core out.
    SADKERN_CUDA   the same of the CUDA kernels; auto: where there is nvcc.
    SADKERN_CHIPS  those that CUDA kernels get machine code for (default: 80,86,89,90a); others take
                   PTX, which is always there.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# -fno-trapping-math and -fno-math-errno let loops become vectors and change no value;
# -ffast-math would break -inf and NaN.
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMMON += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# False alarms from gcc 12's own AVX-512 header.
COMMON += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
KERNELS = ("span_kl", "span_kl_topk", "topk")  # sources compiled once per instruction set
CHIPS = ("80", "86", "89", "90a")
PTX = "90"
# Products and sums are rounded each, where a kernel says no other: equal logits then give 0.
CUDA = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA += [f"-gencode=arch=compute_{PTX},code=compute_{PTX}", "-diag-suppress=177"]
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
ISAS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    ISAS |= {"avx2": avx2, "avx512": avx2 + avx512}


def switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={value!r}: expected auto, 0 or 1")
    return value


def chips() -> list[str]:
    """Those that CUDA kernels get machine code for."""
    value = os.environ.get("SADKERN_CHIPS", "")
    named = value.replace(",", " ").split() or list(CHIPS)
    if wrong := [chip for chip in named if chip not in CHIPS]:
        raise SystemExit(f"SADKERN_CHIPS={value!r}: got {wrong[0]}, expected of {', '.join(CHIPS)}")
    return named


def nvcc() -> str | None:
    """Where it is; None: nowhere."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which(f"{home}/bin/nvcc")


class NinjaBuild(build_ext):
    """Compiles what each extension is made of and links it. Where one cannot be built the package
    goes without it, unless its switch is 1."""

    def build_extension(self, ext: Extension) -> None:
        core = ext.name == "sadkern._C"
        name, without = (
            ("SADKERN_NATIVE", "the package will run on its reference backend")
            if core
            else ("SADKERN_CUDA", "GPUs will be served by Triton alone")
        )
        if switch(name) == "0" or (not core and switch(name) == "auto" and nvcc() is None):
            return
        try:
            self.run_ninja(ext, write_core if core else write_cuda)
        except (OSError, subprocess.CalledProcessError) as error:
            if switch(name) == "1":
                raise SystemExit(f"{name}=1, but {ext.name} could not be built: {error}") from error
            print(
                f"sadkern: {ext.name} could not be built ({error}); {without}. {name}=1 makes this "
                "an error.",
                file=sys.stderr,
            )

    def run_ninja(self, ext: Extension, write: Callable[[Any, Path], None]) -> None:
        import ninja
        from ninja import ninja_syntax

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w") as file:
            write(ninja_syntax.Writer(file), target)
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], check=True)


def write_core(n: Any, target: Path) -> None:
    """The rules for `sadkern._C`: each kernel once per instruction set."""
    write_cxx(n, COMMON)
    n.rule("link", "$cxx -shared -fopenmp $in -o $out", description="link $out")
    objects = compiled(n, "csrc/bindings.cpp")
    for name in ("buffer", "isa", "select"):
        objects += compiled(n, f"csrc/cpu/{name}.cpp")
    for name in KERNELS:
        for isa, flags in ISAS.items():
            flags = [*flags, f"-DSADKERN_ISA={isa}"]
            objects += compiled(n, f"csrc/cpu/{name}.cpp", f"{name}_{isa}", flags)
    n.build(escaped(target), "link", objects)


def write_cuda(n: Any, target: Path) -> None:
    """The rules for `sadkern._cuda`: span_kl once per divergence, for all chips."""
    compiler = nvcc()
    if compiler is None:
        raise OSError("there is no nvcc on the path, nor in CUDA_HOME")
    said = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True
    ).stdout
    release = said.partition("release ")[2].partition(",")[0]
    write_cxx(n, [flag for flag in COMMON if flag != "-fopenmp"])
    n.variable("nvcc", shlex.quote(compiler))
    machine = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips()]
    n.variable("cuda_flags", shlex.join(CUDA + machine))
    n.rule(
        "compile_cuda",
        "$nvcc $cuda_flags $more -MD -MF $out.d -c $in -o $out",
        depfile="$out.d",
        deps="gcc",
        description="compile $out",
    )
    n.rule("link", "$nvcc -shared -cudart static $in -o $out", description="link $out")
    built = ", ".join([release, *(f"sm_{chip}" for chip in chips())])
    objects = compiled(n, "csrc/cuda/bindings.cpp", flags=[f'-DSADKERN_NVCC="{built}"'])
    for name in DIVERGENCES:
        flags = [f"-DSADKERN_DIVERGENCE={name}"]
        objects += compiled(n, "csrc/cuda/span_kl.cu", f"span_kl_{name}", flags, "compile_cuda")
    objects += compiled(n, "csrc/cuda/topk.cu", rule="compile_cuda")
    n.build(escaped(target), "link", objects)


def write_cxx(n: Any, flags: list[str]) -> None:
    """The rule for C++ that pybind11 binds."""
    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    n.variable("cxx", os.environ.get("CXX", "c++"))
    n.variable("flags", shlex.join(flags + [f"-isystem{path}" for path in includes]))
    n.rule(
        "compile",
        "$cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        depfile="$out.d",
        deps="gcc",
        description="compile $out",
    )


def compiled(
    n: Any, source: str, name: str = "", flags: Sequence[str] = (), rule: str = "compile"
) -> list[str]:
    """The object that a source becomes."""
    out = f"{name or Path(source).stem}.o"
    return n.build(out, rule, escaped(ROOT / source), variables={"more": shlex.join(flags)})


def escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


for name in ("SADKERN_NATIVE", "SADKERN_CUDA"):
    switch(name)  # a wrong one is told before anything is built
chips()
setup(
    ext_modules=[Extension(name, [], optional=True) for name in ("sadkern._C", "sadkern._cuda")],
    cmdclass={"build_ext": NinjaBuild},
)
