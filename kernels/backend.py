"""Which implementation of the ops in this package runs: Triton kernels or torch references.

Every op ships twice. The torch reference is the specification and the production path on CPUs; the
Triton kernel is the production path on GPUs. ``VLLM_GRIFFIN_KERNELS`` overrides the choice:
``auto`` (default), ``torch`` or ``triton``.
"""

import os

import torch

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


def describe(device: torch.device) -> str:
    """Name of the implementation that runs on ``device``, for logs and reports."""
    if not use_triton(device):
        return "torch references"
    return "Triton kernels in the interpreter" if interpreted() else "Triton kernels"
