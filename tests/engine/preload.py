"""Imported by the server that `forkserver.fork_always` forks processes from."""

# The environment that tests.conftest sets comes before all else.
# ruff: noqa: F401, I001
import tests.conftest

import vllm.model_executor.model_loader.default_loader
import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker
import vllm.v1.worker.gpu.model_runner

from tests.engine.forkserver import fork_always
from tests.heap import freeze_imports, keep_frozen

fork_always()
keep_frozen()
freeze_imports()
