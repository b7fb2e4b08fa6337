"""What pyproject.toml cannot say: packages found by rule, and kernels compiled into wheels."""

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path(__file__).parent / "kernels" / "autoquant_kernels"


def load_builder() -> ModuleType:
    """`autoquant_kernels.build` without its package, which would import torch."""
    spec = importlib.util.spec_from_file_location("build_kernels", KERNELS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Compiles into the wheel; an editable install compiles at first use instead."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        builder = load_builder()
        name = builder.shipped_library().name
        try:
            builder.compile_library(Path(self.build_lib) / "autoquant_kernels" / name)
        except builder.BuildError as error:
            self.warn(f"C++ kernels are not in this wheel: {error}")


class PlatformWheel(bdist_wheel):
    """Where a compiler is at hand the wheel serves every Python 3 of one platform, else all."""

    def finalize_options(self) -> None:
        compiled = load_builder().has_compiler()
        self.distribution.has_ext_modules = lambda: compiled
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    packages=[
        *find_packages(include=["autoquant", "autoquant.*"]),
        "autoquant.search_spaces",
        *find_packages("kernels", include=["autoquant_kernels", "autoquant_kernels.*"]),
    ],
    package_dir={
        "autoquant.search_spaces": "search_spaces",
        "autoquant_kernels": "kernels/autoquant_kernels",
    },
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel},
)
