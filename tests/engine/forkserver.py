"""Engine processes forked from a server that has imported vLLM; on a CPU vLLM has each import it anew.

What is sent to a process stays what vLLM pickles for it, and each sets the plugin up by itself. That
fresh processes do is for the tests that start servers (`tests/test_examples.py`, `tests/load`).
"""

import contextlib
import os
from collections.abc import Iterator
from multiprocessing import context, forkserver, set_forkserver_preload, spawn
from typing import Any


class _Environment:
    """Unpickles as the environment of the process that pickles it, which a fork lacks."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (dict(os.environ),)


def _restore(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # The server that this process was forked from serves its own processes too.
    forkserver._forkserver.ensure_running = lambda: None


def _with_environment(name: str) -> dict[str, Any]:
    return _preparation_data(name) | {"environment": _Environment()}


_preparation_data = spawn.get_preparation_data
_methods: dict[str, Any] = context._concrete_contexts


def fork_always() -> None:
    """From here on, processes that ask to be spawned are forked from the server."""
    set_forkserver_preload(["tests.engine.preload"])
    _methods["spawn"] = _methods["forkserver"]
    spawn.get_preparation_data = _with_environment


@contextlib.contextmanager
def forked_processes() -> Iterator[None]:
    """As `fork_always`, for a while."""
    before = _methods["spawn"]
    fork_always()
    try:
        yield
    finally:
        _methods["spawn"] = before
        spawn.get_preparation_data = _preparation_data
