"""Keeps what has been imported out of the garbage collector's way.

vLLM collects garbage again and again in the life of an engine, each time through all objects of torch
and transformers: most of the time that a small engine takes.
"""

import atexit
import gc

# At the end all must go, or Triton's bindings report a thousand leaks.
atexit.register(gc.unfreeze)


def freeze_imports() -> None:
    """Takes the objects of now out of later collections; an engine's own stay in."""
    gc.collect()
    gc.freeze()


def keep_frozen() -> None:
    """An engine neither freezes its own objects, nor thaws all others when it ends.

    Only for engines on a CPU: capturing CUDA graphs needs both.
    """
    import vllm.v1.engine.core as core

    core.freeze_gc_heap = lambda: None
    gc.unfreeze = lambda: None
