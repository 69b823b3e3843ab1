"""What the benchmarks of speed share: vLLM's runners, options, and where a result comes from."""

from typing import Any

import click

CPU = "VLLM_GRIFFIN_CPU"
# The environment of a process with each of vLLM's runners; None takes a variable away. What the
# CPU's switch sets in this process must not reach one without it.
RUNNERS: dict[str, dict[str, str | None]] = {
    "V1": {CPU: None, "TRITON_INTERPRET": None, "VLLM_USE_V2_MODEL_RUNNER": "0"},
    "V2": {"VLLM_USE_V2_MODEL_RUNNER": "1"},
}


def numbers(_context: click.Context, _parameter: click.Parameter, text: str) -> list[int]:
    """Of an option like `1,2,4`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of integers") from None


def tree_fields(nodes: int, depth: int, top_k: int) -> dict[str, int]:
    """Of a speculative config."""
    return {"num_speculative_tokens": nodes, "tree_depth": depth, "tree_top_k": top_k}


def origin(made: dict[str, Any]) -> list[str]:
    """The last lines of a page: the command, the machine and the versions."""
    hardware = ", ".join(f"{k} {v}" for k, v in made["hardware"].items())
    versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
    return ["", f"`{made['command']}`", "", f"{hardware}; commit {made['commit']}; {versions}", ""]
