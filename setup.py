"""What pyproject.toml cannot say: packages found by rule and mapped to their folders."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["autoquant", "autoquant.*"]),
        "autoquant.search_spaces",
        "autoquant_kernels",
    ],
    package_dir={
        "autoquant.search_spaces": "search_spaces",
        "autoquant_kernels": "kernels/autoquant_kernels",
    },
)
