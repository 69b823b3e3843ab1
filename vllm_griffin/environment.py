"""The variables ``VLLM_GRIFFIN_*``, checked at the start of an engine."""

import os

import torch

from vllm_griffin.config_errors import advice
from vllm_griffin.kernels.backend import use_triton
from vllm_griffin.trace import open_trace

PREFIX = "VLLM_GRIFFIN_"
KNOWN = (
    "VLLM_GRIFFIN_CACHE",
    "VLLM_GRIFFIN_CPU",
    "VLLM_GRIFFIN_KERNELS",
    "VLLM_GRIFFIN_TRACE",
    "VLLM_GRIFFIN_TREE_ATTENTION",
)


def check_environment() -> None:
    """Refuses a variable that is misspelt, or whose value would end a worker.

    ``VLLM_GRIFFIN_CPU`` has been read by then, when the process loaded the plugin.

    Raises:
        ValueError: names the variable and what it may be.
        RuntimeError: Triton is demanded on a CPU, but is not interpreted there.
    """
    # Deferred: attention needs Triton, whose absence is said elsewhere.
    from vllm.platforms import current_platform

    from vllm_griffin.attention.prefix import demanded_form

    for name in os.environ:
        if name.startswith(PREFIX) and name not in KNOWN:
            # They are alike by their first words already.
            raise ValueError(f"the variable {name} is not known: {advice(name, KNOWN, 0.9)}")
    use_triton(torch.device(current_platform.device_type))
    demanded_form()
    trace = os.environ.get("VLLM_GRIFFIN_TRACE")
    if trace:
        open_trace(trace).close()
