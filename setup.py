"""Builds `sadkern._C` with pybind11, OpenMP and ninja; everything else stands in pyproject.toml.

Nothing here imports torch: the core takes addresses and sizes, so one build serves every torch.
Without a working C++17 compiler the package installs all the same, with the reference backend.

Environment
    CXX            the compiler (default: c++)
    SADKERN_CUDA   auto (default), 1 or 0: whether to build CUDA kernels. There are none yet: 1 is
                   refused.
    SADKERN_NATIVE auto (default), 1 or 0: 1 makes a failing build an error, 0 leaves the core out.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

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


class NinjaBuild(build_ext):
    """Compiles each kernel once per instruction set and links the lot."""

    def build_extension(self, ext: Extension) -> None:
        if switch("SADKERN_CUDA") == "1":
            raise SystemExit(
                "SADKERN_CUDA=1, but this version has no CUDA kernels: expected auto or 0"
            )
        if switch("SADKERN_NATIVE") == "0":
            return
        try:
            self.run_ninja(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            if switch("SADKERN_NATIVE") == "1":
                raise SystemExit(
                    f"SADKERN_NATIVE=1, but the core could not be built: {error}"
                ) from error
            print(
                f"sadkern: the compiled core could not be built ({error}); the package will run on "
                "its reference backend. SADKERN_NATIVE=1 makes this an error.",
                file=sys.stderr,
            )

    def run_ninja(self, ext: Extension) -> None:
        import ninja
        import pybind11
        from ninja import ninja_syntax

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]

        with open(folder / "build.ninja", "w") as file:
            n = ninja_syntax.Writer(file)
            n.variable("cxx", os.environ.get("CXX", "c++"))
            n.variable("flags", shlex.join(COMMON + [f"-isystem{path}" for path in includes]))
            n.rule(
                "compile",
                "$cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="compile $out",
            )
            n.rule("link", "$cxx -shared -fopenmp $in -o $out", description="link $out")
            objects = []
            for source in ext.sources:
                path = ROOT / source
                kernel = path.stem in KERNELS
                for isa, flags in ISAS.items() if kernel else [("", [])]:
                    name = f"{path.stem}_{isa}.o" if isa else f"{path.stem}.o"
                    isa_flags = shlex.join([*flags, f"-DSADKERN_ISA={isa}"]) if isa else ""
                    objects += n.build(
                        name,
                        "compile",
                        ninja_syntax.escape_path(str(path)),
                        variables={"isa": isa_flags},
                    )
            n.build(ninja_syntax.escape_path(str(target)), "link", objects)
        subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", folder], check=True)


setup(
    ext_modules=[
        Extension(
            "sadkern._C",
            ["csrc/bindings.cpp"]
            + [f"csrc/cpu/{name}.cpp" for name in ("buffer", "isa", "select", *KERNELS)],
            optional=True,
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
)
