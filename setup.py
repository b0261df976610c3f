"""How the C++ kernels are compiled, in the words of each compiler; everything else stands in pyproject.toml."""

import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

COMMON = {"unix": ["-std=c++17", "-O3"], "msvc": ["/std:c++17", "/O2", "/fp:precise"]}
OPENMP = {"unix": "-fopenmp", "msvc": "/openmp:experimental"}


class BuildKernels(build_ext):
    """Compile with OpenMP where the compiler has it: Apple's clang does not, and its kernels use one thread."""

    def build_extensions(self) -> None:
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        threads = [OPENMP[kind]] if self._has_openmp(OPENMP[kind]) else []
        if not threads:
            self.warn(f"the compiler does not take {OPENMP[kind]}: the C++ kernels are built without OpenMP")
        for extension in self.extensions:
            own = extension.extra_compile_args if kind == "unix" else []
            extension.extra_compile_args = [*COMMON[kind], *own, *threads]
            extension.extra_link_args = threads if kind == "unix" else []
        super().build_extensions()

    def _has_openmp(self, flag: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "threads.cpp")
            source.write_text('#include <omp.h>\nextern "C" int threads() { return omp_get_max_threads(); }\n')
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_preargs=[flag])
                self.compiler.link_shared_object(objects, str(Path(folder, "threads.so")), extra_preargs=[flag])
            except (CompileError, LinkError):
                return False
        return True


def kernel(name: str, source: str, *flags: str) -> Extension:
    """An extension with Python's stable interface; without a compiler the package installs all the same."""
    return Extension(
        f"ncollapse.kernels.{name}", [source], depends=["kernels/_half.h", "kernels/_compiler.h"],
        extra_compile_args=[*flags], py_limited_api=True, optional=True,
    )  # fmt: skip


setup(
    ext_modules=[
        kernel(
            "update._cpu",
            "kernels/update/_cpu.cpp",
            "-ffp-contract=off",  # products and sums are rounded one by one, as in the reference
            "-fno-math-errno",
            "-fno-trapping-math",  # or roots and choices would not become vectors
            "-fno-unswitch-loops",  # dozens of copies of each loop otherwise, and minutes to compile them
        ),
        kernel("class_stats._cpu", "kernels/class_stats/_cpu.cpp", "-fno-math-errno", "-fno-trapping-math"),
        kernel("_tensors", "kernels/_tensors.cpp"),
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
