"""The target in a plain vLLM engine, without speculation."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import click
import torch

from vllm_griffin.compat import INSTALL, install_command_patches


def batch_size() -> int:
    """Requests that the engine answers at one time."""
    return 256 if torch.cuda.is_available() else 64


def prepare_environment(threads: int | None) -> None:
    """Settings that vLLM reads from the environment when it is imported, unless the user has made them.

    Without a GPU the engine is this package's Model Runner V2 on the CPU: vLLM's own CPU engine takes no
    seeds. Call it before anything imports Triton.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Asking for a GPU must not begin CUDA here: vLLM forks its engine.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch.cuda.is_available():
        return
    from vllm_griffin.cpu.shim import prepare_process

    for name, value in {
        "VLLM_GRIFFIN_CPU": "1",
        # GiB. vLLM itself would take nearly all memory, which the Hugging Face model needs as well.
        "VLLM_CPU_KVCACHE_SPACE": str(min(4, max(1, _memory_gib() // 6))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Threads pinned by the engine would stay pinned for what this process does afterwards.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }.items():
        os.environ.setdefault(name, value)
    prepare_process()


def _memory_gib() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30


@contextmanager
def engine(
    target: str, max_length: int, seed: int, tensor_parallel: int = 1, **arguments: Any
) -> Iterator[Any]:
    """A `vllm.LLM` of the target, shut down at the end.

    Args:
        target: Model folder.
        max_length: Tokens of a prompt and its response, at most.
        seed: Seed of the engine.
        tensor_parallel: GPUs that share the model.
        arguments: More of `vllm.LLM`'s.

    Raises:
        click.ClickException: vLLM is not installed.
    """
    try:
        from vllm import LLM, envs
    except ImportError as error:
        raise click.ClickException(f"this needs vLLM ({INSTALL}): {error}") from error
    on_gpu = torch.cuda.is_available()
    # Here hidden states follow by the target's Hugging Face model, which vLLM's compiler would change.
    in_process = not envs.VLLM_ENABLE_V1_MULTIPROCESSING
    if in_process:
        install_command_patches()
    defaults: dict[str, Any] = {
        "dtype": "auto" if on_gpu else "float32",
        "enforce_eager": in_process or not on_gpu,
        "max_num_seqs": batch_size(),
    }
    llm = LLM(
        target,
        max_model_len=max_length,
        seed=seed,
        tensor_parallel_size=tensor_parallel,
        **(defaults | arguments),
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def answers(llm: Any, requests: Iterable[tuple[list[int], Any]]) -> Iterator[tuple[int, Any]]:
    """The engine's answers as they come, each with the number of its request.

    Requests, token ids of a prompt and `SamplingParams`, are taken from the iterable as the engine gets room,
    so that it is kept busy, however different their lengths are.
    """
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    most = 2 * engine.vllm_config.scheduler_config.max_num_seqs
    numbered = enumerate(requests)
    open_requests = 0
    while True:
        for number, (prompt, params) in islice(numbered, most - open_requests):
            params.output_kind = RequestOutputKind.FINAL_ONLY
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
            open_requests += 1
        if not open_requests:
            return
        for output in engine.step():
            open_requests -= 1
            yield int(output.request_id), output


def complete(llm: Any, prompts: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
    """What the engine answers to prompts of token ids, in their order."""
    outputs: list[Any] = llm.generate(
        [{"prompt_token_ids": tokens} for tokens in prompts], list(params), use_tqdm=False
    )
    return outputs
