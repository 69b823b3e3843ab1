"""Which implementation of the ops in this package runs: Triton kernels or torch references.

Every op ships twice. The torch reference is the specification and the production path on CPUs, where a few
ops have a faster form of their own; the Triton kernel is that on GPUs. ``VLLM_GRIFFIN_KERNELS`` overrides the
choice: ``auto`` (default), ``torch`` or ``triton``.
"""

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

ENV = "VLLM_GRIFFIN_KERNELS"
CHOICES = ("auto", "torch", "triton")


def _choice() -> str:
    choice = os.environ.get(ENV) or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{ENV}={choice!r} is not one of {', '.join(CHOICES)}")
    return choice


def interpreted() -> bool:
    """Whether kernels decorated from now on run in Triton's interpreter."""
    # Deferred: asking which backend runs must work where triton is not installed.
    import triton

    # Triton reads TRITON_INTERPRET while it is imported; its own library tells what it read.
    return not isinstance(triton.language.zeros, triton.JITFunction)


def use_triton(device: torch.device) -> bool:
    """Whether ops on tensors of ``device`` run as Triton kernels.

    Raises:
        ValueError: ``VLLM_GRIFFIN_KERNELS`` has a value that is not known.
        RuntimeError: Triton is demanded on a CPU, but is not interpreted there.
    """
    choice = _choice()
    if choice == "auto":
        return device.type == "cuda"
    if choice == "triton" and device.type != "cuda" and not interpreted():
        raise RuntimeError(
            f"{ENV}=triton on {device.type} tensors runs in Triton's interpreter: set "
            f"TRITON_INTERPRET=1 before the process starts, or {ENV}=torch"
        )
    return choice == "triton"


def runs_own_form(device: torch.device) -> bool:
    """Whether ops that have a form of their own for CPUs run as that; any demand is for the other two."""
    return device.type == "cpu" and _choice() == "auto"


def dispatched(reference: Callable[P, R], kernel: Callable[..., R]) -> Callable[P, R]:
    """The op that runs `kernel` where `use_triton` says so, and `reference`, its specification, elsewhere.

    Its first tensor is given by position and decides by its device.
    """

    @functools.wraps(reference)
    def op(*args: P.args, **named: P.kwargs) -> R:
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        return (kernel if use_triton(device) else reference)(*args, **named)

    return op


def describe(device: torch.device) -> str:
    """Name of the implementation that runs on ``device``, for logs and reports."""
    if not use_triton(device):
        return "torch"
    return "Triton kernels in the interpreter" if interpreted() else "Triton kernels"
