"""The variables ``VLLM_GRIFFIN_*``: made known to vLLM, and checked at the start of an engine."""

import os

PREFIX = "VLLM_GRIFFIN_"
KNOWN = (
    "VLLM_GRIFFIN_CACHE",
    "VLLM_GRIFFIN_CPU",
    "VLLM_GRIFFIN_KERNELS",
    "VLLM_GRIFFIN_TRACE",
    "VLLM_GRIFFIN_TREE_ATTENTION",
)


def register_variables() -> None:
    """Enters those that are set in vLLM's list, so that it neither warns of them nor refuses to start.

    Their value there is None: it would become part of the key of compiled graphs, which do not depend on it.
    """
    from vllm import envs

    for name in KNOWN:
        if name in os.environ:
            envs.environment_variables.setdefault(name, lambda: None)


def check_environment() -> None:
    """Refuses a variable that is misspelt, or whose value would end a worker.

    ``VLLM_GRIFFIN_CPU`` has been read by then, when the process loaded the plugin.

    Raises:
        ValueError: names the variable and what it may be.
        RuntimeError: Triton is demanded on a CPU, but is not interpreted there.
    """
    # Deferred: every process of vLLM's loads this module, and attention needs Triton, whose absence is
    # said elsewhere.
    import torch
    from vllm.platforms import current_platform

    from vllm_griffin.attention.prefix import demanded_form
    from vllm_griffin.config_errors import advice
    from vllm_griffin.kernels.backend import use_triton
    from vllm_griffin.trace import open_trace

    for name in os.environ:
        if name.startswith(PREFIX) and name not in KNOWN:
            # They are alike by their first words already.
            raise ValueError(f"the variable {name} is not known: {advice(name, KNOWN, 0.9)}")
    use_triton(torch.device(current_platform.device_type))
    demanded_form()
    trace = os.environ.get("VLLM_GRIFFIN_TRACE")
    if trace:
        open_trace(trace).close()
