"""Triton's interpreter without its slowest habit.

Whenever a kernel calls a device function, the interpreter prepares all of `triton.language` anew, though it
has been prepared for the kernel: `triton.runtime.interpreter.InterpretedFunction.__call__` of Triton 3.9.
"""

import functools
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def prepare_language_once() -> None:
    """Device functions prepare only what is not prepared."""
    interpreter.InterpretedFunction.__call__ = _call


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    # What is prepared is no longer marked as a function of the language.
    if any(tl.core.is_builtin(module.arange) for module in _languages(self.fn)):
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


@functools.cache
def _languages(fn: Any) -> list[ModuleType]:
    return [value for value in fn.__globals__.values() if value is tl or value is tl.core]
