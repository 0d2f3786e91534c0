"""The C++ extension and nothing else; metadata is in pyproject.toml. TOPD_BUILD_CPP=0 skips it."""

import os
import platform
from pathlib import Path

from setuptools import setup

CSRC = Path("csrc")
X86_VARIANTS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ],
}
VARIANTS = (
    X86_VARIANTS
    if platform.machine().lower() in ("x86_64", "amd64")
    else {"default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]}
)
# -fopenmp only compiles: without it at::parallel_for runs on one thread, and linked with it the library would bring a second
# OpenMP runtime beside the one that torch ships, which resolves these symbols when the library is loaded.
FLAGS = [
    "-fopenmp",
    "-O3",
    "-g0",
    "-std=c++20",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]


def extension_arguments() -> dict[str, object]:
    """One library for each instruction set, all from the same sources; topd.backends loads the best that runs."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildVariants(BuildExtension):
        def build_extension(self, ext: CppExtension) -> None:
            shared = self.build_temp
            self.build_temp = str(Path(shared) / ext.name)
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

    return {
        "ext_modules": [
            CppExtension(
                f"topd._cpp_{name}",
                sources=[str(path) for path in sorted(CSRC.rglob("*.cpp"))],
                depends=[str(path) for path in sorted(CSRC.rglob("*.h"))],
                extra_compile_args=[*FLAGS, *flags],
            )
            for name, flags in VARIANTS.items()
        ],
        "cmdclass": {"build_ext": BuildVariants},
    }


setup(**({} if os.environ.get("TOPD_BUILD_CPP", "1") == "0" else extension_arguments()))
