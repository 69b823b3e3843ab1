"""The switch ``VLLM_GRIFFIN_CPU``: makes vLLM take Model Runner V2 on a CPU.

vLLM decides whether Triton is usable, and with it which model runner it takes, while
``vllm.triton_utils`` is imported. `prepare_process` runs before that, in every process, from a
``vllm.platform_plugins`` entry point.
"""

import logging
import os
import sys

SWITCH = "VLLM_GRIFFIN_CPU"

# What the interpreted Model Runner V2 needs in the environment, in child processes too.
_ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

# A child of vLLM's own logger, so that vLLM's handlers and level apply.
_logger = logging.getLogger("vllm.griffin.cpu")

_gpu_reported = False


def switched_on() -> bool:
    """Whether the environment asks for the CPU shim.

    Raises:
        ValueError: the variable holds anything but ``"1"``, ``"0"`` or nothing.

    """
    value = os.environ.get(SWITCH, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}={value!r}: only 1 (on) and 0 (off) are known")
    return value == "1"


def prepare_process() -> None:
    """Sets this process up for Model Runner V2 on a CPU, if ``VLLM_GRIFFIN_CPU`` asks for it.

    Does nothing but log a line where a GPU driver is active. Idempotent. vLLM swallows what a
    platform plugin raises, so ``vllm_griffin.register`` calls this again to let errors be seen.

    Raises:
        ValueError: the switch, or a variable that the shim needs, has a value that contradicts it.
        RuntimeError: Triton is missing, or was imported too early to be prepared.

    """
    if not switched_on():
        return
    if _gpu_is_active():
        _report_gpu()
        return
    _require_environment()
    if not _has_triton_cpu():
        _install_interpreter_backend()
        from vllm_griffin.cpu.patches import apply

        apply()
    _require_vllm_sees_triton()


def _gpu_is_active() -> bool:
    # Asked of torch, as Triton's own drivers do: importing Triton to ask it would fix whether
    # its library functions are interpreted.
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available()


def _report_gpu() -> None:
    global _gpu_reported
    if not _gpu_reported:
        _gpu_reported = True
        _logger.info("%s=1 has no effect: a GPU driver is active", SWITCH)


def _require_environment() -> None:
    needed = dict(_ENVIRONMENT)
    if _has_triton_cpu():
        del needed["TRITON_INTERPRET"]
    for name, value in needed.items():
        found = os.environ.setdefault(name, value)
        if found != value:
            raise ValueError(f"{SWITCH}=1 needs {name}={value}, but it is set to {found!r}")


def _has_triton_cpu() -> bool:
    """Whether a Triton that compiles for CPUs is installed."""
    from importlib.metadata import entry_points

    return any(point.name == "cpu" for point in entry_points(group="triton.backends"))


def _install_interpreter_backend() -> None:
    try:
        import triton.backends  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"{SWITCH}=1 needs Triton, whose interpreter runs vLLM's kernels on a CPU: "
            "pip install triton"
        ) from error
    from vllm_griffin.cpu.interpreter import install_backend, interpret_library

    interpret_library()
    install_backend()


def _require_vllm_sees_triton() -> None:
    importing = sys.modules.get("vllm.triton_utils.importing")
    # Absent: vLLM has yet to look. Without the attribute: it is looking right now, through us.
    if importing is not None and getattr(importing, "HAS_TRITON", True) is False:
        raise RuntimeError(
            f"{SWITCH}=1 came too late: vLLM had already decided to run without Triton. Set it "
            "before vLLM is imported; where VLLM_PLUGINS is set it must list griffin_cpu, and "
            "VLLM_TARGET_DEVICE must not be set."
        )
