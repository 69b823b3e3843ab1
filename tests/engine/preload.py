"""What `forkserver.forked_processes` has imported, and set, in the server that its processes are forked from."""

import tests.conftest  # noqa: F401 - the environment comes first

import vllm.model_executor.model_loader.default_loader  # noqa: F401, I001
import vllm.model_executor.models.llama  # noqa: F401
import vllm.v1.engine.core
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker
import vllm.v1.worker.gpu.model_runner  # noqa: F401

from tests.engine.forkserver import fork_always
from tests.heap import freeze_imports, keep_frozen

fork_always()
keep_frozen()
freeze_imports()
