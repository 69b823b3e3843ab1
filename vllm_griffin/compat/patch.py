"""How a name in vLLM is replaced: once, checked, and with its reason."""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MARK = "_vllm_griffin_original"


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is not one that this plugin was written for."""


def replace_attribute(owner: Any, name: str, value: Any) -> None:
    """Gives an object of vLLM another attribute in the place of the one that vLLM reads.

    Raises:
        UnsupportedVllmError: there is none; a new one would be read by nobody.
    """
    if not hasattr(owner, name):
        raise UnsupportedVllmError(
            f"vllm-griffin: vLLM's {type(owner).__name__}.{name} has gone; install vllm 0.32 or a newer "
            "vllm-griffin."
        )
    setattr(owner, name, value)


@dataclass(frozen=True)
class Patch:
    """One replaced name of vLLM.

    Attributes:
        module: where the name is defined.
        name: the attribute, dotted for a method (``EngineArgs.create_engine_config``).
        parameters: the original's parameter names; any others mean that the seam has moved.
        replacement: takes the original and returns what stands in its place.
        reason: why vLLM as it is does not do.
        until: the condition under which the patch can go.
        imported_by: modules that import the name by name, patched as well where they are loaded.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    replacement: Callable[[Callable[..., Any]], Callable[..., Any]]
    reason: str
    until: str
    imported_by: tuple[str, ...] = ()

    def apply(self) -> None:
        """Replaces the name; a second call finds it replaced and does nothing.

        Raises:
            UnsupportedVllmError: the seam is gone or takes other parameters.
        """
        owner, attribute = self._locate()
        original = getattr(owner, attribute, None)
        if original is None:
            raise UnsupportedVllmError(self._moved("it is not there"))
        if not hasattr(original, _MARK):
            found = tuple(inspect.signature(original).parameters)
            if found != self.parameters:
                raise UnsupportedVllmError(self._moved(f"it takes ({', '.join(found)})"))
            new = self.replacement(original)
            setattr(new, _MARK, original)
            setattr(owner, attribute, new)
        for module_name in self.imported_by:
            module = sys.modules.get(module_name)
            if module is not None and not hasattr(getattr(module, attribute), _MARK):
                setattr(module, attribute, getattr(owner, attribute))

    def _locate(self) -> tuple[Any, str]:
        owner: Any = importlib.import_module(self.module)
        *path, attribute = self.name.split(".")
        for part in path:
            owner = getattr(owner, part, None)
        return owner, attribute

    def _moved(self, what: str) -> str:
        return (
            f"vllm-griffin: vLLM's {self.module}.{self.name} has changed ({what}, expected "
            f"({', '.join(self.parameters)})); install vllm 0.32 or a newer vllm-griffin."
        )
