"""The environment of every test, set before anything imports torch or vLLM."""

import os
import sys

DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    # The test models are so small that threads only wait for each other, the more so on a busy
    # machine, where a step takes twenty times as long with two pinned ones.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402 - after the above
import torch  # noqa: E402

from tests.heap import freeze_imports, keep_frozen  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("VLLM_GRIFFIN_CPU", "1")
    from vllm_griffin.cpu.shim import prepare_process

    # vLLM would call it in time for an engine, but some tests begin with vLLM's inner modules.
    prepare_process()

    from tests.interpreter import prepare_language_once

    prepare_language_once()


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """All test files have been imported by now, and what those before this one made has gone."""
    if not torch.cuda.is_available() and "vllm.v1.engine.core" in sys.modules:
        keep_frozen()
        freeze_imports()
