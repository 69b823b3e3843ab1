"""The seams to vLLM: ``patches.py`` lists each name that is replaced, once.

Attributes of single objects go through ``patch.replace_attribute``; methods of single modules are put past
torch's own ``__setattr__``, into their ``__dict__`` (``runner/speculator.py``).
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_griffin.compat.patch import Patch

SUPPORTED = "0.32"
INSTALL = f"pip install 'vllm=={SUPPORTED}.*', or on a CPU `make setup` in vllm-griffin's folder"
INSTALL_TRAIN = "pip install -e '.[train]' in vllm-griffin's folder"


def install() -> None:
    """Makes vLLM's front end understand ``"method": "griffin"``; cheap, and safe to repeat.

    Only a process that has EngineArgs loaded can be asked for griffin, so elsewhere (engine core,
    workers, model inspection) there is nothing to do.
    """
    if "vllm.engine.arg_utils" not in sys.modules:
        return
    from vllm_griffin.compat.patches import CONFIG_PATCHES

    _apply_or_warn(CONFIG_PATCHES)


def _apply_or_warn(patches: "Iterable[Patch]") -> None:
    """For engines that may not need the patch: they must start all the same."""
    from vllm_griffin.compat.patch import UnsupportedVllmError

    try:
        for patch in patches:
            patch.apply()
    except UnsupportedVllmError as error:
        from vllm.logger import init_logger

        init_logger("vllm.griffin").warning("%s", error)


def install_engine_patches() -> None:
    """Prepares this process to run a griffin engine; called where the engine's config arrives."""
    from vllm_griffin.compat.patches import ENGINE_PATCHES

    for patch in ENGINE_PATCHES:
        patch.apply()


def install_command_patches() -> None:
    """Prepares a process of our command line to run a plain engine beside Hugging Face models."""
    from vllm_griffin.compat.patches import COMMAND_PATCHES

    _apply_or_warn(COMMAND_PATCHES)


def check_version() -> None:
    """Raises UnsupportedVllmError, in one sentence, unless vLLM is 0.32.x."""
    from vllm_griffin.compat.patch import UnsupportedVllmError

    version = _vllm_version()
    if not _supported(version):
        raise UnsupportedVllmError(
            f"vllm-griffin works with vLLM {SUPPORTED}.x, but {version} is installed: {INSTALL}"
        )


def _vllm_version() -> str:
    from vllm.version import __version__

    return __version__


def _supported(version: str) -> bool:
    return version.startswith(f"{SUPPORTED}.")
