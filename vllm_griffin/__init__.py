"""GRIFFIN draft trees for vLLM.

vLLM imports this package in every process, including those that never asked for griffin, so nothing
heavy is imported here.
"""

__version__ = "0.1.0"


def register() -> None:
    """Entry point ``vllm.general_plugins``: makes ``"method": "griffin"`` known to vLLM."""
    # Again, because vLLM swallows what a platform plugin raises.
    cpu_platform()
    from vllm_griffin.compat import install
    from vllm_griffin.compat.speculators import register_layout
    from vllm_griffin.environment import register_variables

    register_variables()
    install()
    register_layout()


def cpu_platform() -> str | None:
    """Entry point ``vllm.platform_plugins``: runs Model Runner V2 on a CPU if asked to.

    Always answers ``None``, so that vLLM goes on to its own platforms.
    """
    import os

    if "VLLM_GRIFFIN_CPU" in os.environ:
        from vllm_griffin.cpu.shim import prepare_process

        prepare_process()
    return None
