"""Packaging: ``kernels/`` is installed as ``vllm_griffin.kernels``.

It must not be importable as a top-level ``kernels`` package, because ``transformers`` looks for a
library of that name.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vllm_griffin", "vllm_griffin.*"]), "vllm_griffin.kernels"],
    package_dir={"vllm_griffin": "vllm_griffin", "vllm_griffin.kernels": "kernels"},
)
