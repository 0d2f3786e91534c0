"""The C++ extension and nothing else; metadata is in pyproject.toml.

TOPD_BUILD_CPP=0 skips the extension, 1 ends the installation where it cannot be built; unset, what can be built is built.
"""

import logging
import os
import platform
import sys
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

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


def extension_arguments(must_build: bool) -> dict[str, object]:
    """Describe one library for each instruction set, all from the same sources; topd.backends loads the best that runs.

    A variant that cannot be built is left out and named in the last line; where it must be built, it ends the installation.
    """
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"topd: {error.name} is not installed here, and the extension is built against it: install torch first, "
            "then `pip install --no-build-isolation .`; TOPD_BUILD_CPP=0 installs topd without the extension"
        ) from None

    class BuildVariants(BuildExtension):
        def build_extensions(self) -> None:
            variants, self.built = self.extensions, []
            self.force = True  # what an earlier torch built is not up to date
            try:
                super().build_extensions()
            except Exception as error:
                if must_build:
                    raise CompileError(
                        f"topd: the C++ extension could not be built ({error}, see above): install a C++20 compiler, "
                        "or set TOPD_BUILD_CPP=0 to install topd without the extension"
                    ) from error
                self.announce(f"{type(error).__name__}: {error}", level=logging.ERROR)
            self.extensions = self.built
            if missing := [each.name for each in variants if each not in self.built]:
                print(
                    f"topd: not built: {', '.join(missing)} (see above). Where no variant runs, CPU calls take the backend "
                    '"eager"; a C++20 compiler builds it, TOPD_BUILD_CPP=1 makes a failure an error, 0 skips the build',
                    file=sys.stderr,
                )

        def build_extension(self, ext: CppExtension) -> None:
            shared = self.build_temp
            self.build_temp = str(Path(shared) / ext.name)
            try:
                super().build_extension(ext)
                self.built.append(ext)
            except Exception as error:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build
                if must_build:
                    raise
                self.announce(f"{type(error).__name__}: {error}", level=logging.ERROR)
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


wish = os.environ.get("TOPD_BUILD_CPP", "")
if wish not in ("", "0", "1"):
    raise SystemExit(f"topd: TOPD_BUILD_CPP must be 0 (skip the extension), 1 (it must build) or unset (try), got {wish!r}")
setup(**({} if wish == "0" else extension_arguments(must_build=wish == "1")))
