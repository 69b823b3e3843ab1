"""Triton as its interpreter, in a process that may have imported it as a compiler.

vLLM counts the active drivers before it uses Triton; the interpreter has none, so a backend stands
in that only says it is there.
"""

import sys
from typing import Any, NoReturn

from triton.backends import Backend, backends
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


def interpret_library() -> None:
    """Makes Triton's own device functions interpreted ones, whenever Triton was imported.

    ``TRITON_INTERPRET`` decides when a function is decorated. vLLM imports Triton, and so decorates
    its library, before it runs any plugin.
    """
    interpreted: dict[int, InterpretedFunction] = {}
    for name, module in list(sys.modules.items()):
        if name == "triton" or name.startswith("triton."):
            _replace_compiled(module, interpreted)
            for value in list(vars(module).values()):
                # Device functions double as methods of Triton's tensor.
                if isinstance(value, type) and value.__module__ == name:
                    _replace_compiled(value, interpreted)


def _replace_compiled(owner: Any, interpreted: dict[int, InterpretedFunction]) -> None:
    for name, value in list(vars(owner).items()):
        if type(value) is JITFunction:
            # By identity: hashing one would compile its source.
            if id(value) not in interpreted:
                interpreted[id(value)] = InterpretedFunction(value.fn)
            setattr(owner, name, interpreted[id(value)])


def install_backend() -> None:
    """Makes ``cpu`` the only backend that Triton and vLLM find. Idempotent."""
    # In place: both hold this dictionary by reference.
    backends.clear()
    backends["cpu"] = Backend(InterpreterCompiler, InterpreterDriver)


def _no_compiler() -> NoReturn:
    raise RuntimeError("this process runs Triton in the interpreter and compiles nothing")


class InterpreterCompiler(BaseBackend):
    """Stands where a compiler would; every use of it is an error."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: dict[str, Any]) -> object:
        return _no_compiler()

    def add_stages(self, stages: dict[str, Any], options: object, *_: Any) -> None:
        _no_compiler()

    def load_dialects(self, context: Any) -> None:
        _no_compiler()

    def get_module_map(self) -> dict[str, Any]:
        return {}


class InterpreterDriver(DriverBase):
    """A driver that is always active and drives nothing."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return _no_compiler()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", "interpreter", 1)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        return _no_compiler()
