"""Runs requests through real engines, with requests coming and going, and compares the outputs."""

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from tests.engine.forkserver import forked_processes

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"
MODELS = ROOT / "examples" / "models"
PAIRS = {
    "golden-a": (GOLDEN / "a" / "target", GOLDEN / "a" / "draft"),
    "golden-b": (GOLDEN / "b" / "target", GOLDEN / "b" / "draft"),
    "tiny": (MODELS / "target", MODELS / "griffin"),
    "tiny-eagle": (MODELS / "target", MODELS / "eagle"),
}
# Two best this close in float32 are a tie: batch shapes change the last bits of a logit.
NEAR_TIE = 1e-4
# Room for 100,000 tokens of the tiny target; to fill more with zeros takes as long as a test.
KV_CACHE_BYTES = 1 << 28


@dataclass
class Request:
    """One request, and the engine step before which it arrives."""

    name: str
    prompt: list[int]
    params: SamplingParams
    arrival: int = 0
    # Lower is served first, where the engine schedules by priority.
    priority: int = 0


@dataclass
class Outcome:
    """What an engine made of a list of requests."""

    # request name -> tokens
    tokens: dict[str, list[int]] = field(default_factory=dict)
    # request name -> RequestOutput, its deltas joined
    outputs: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    steps: int = 0

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / drafts, from vLLM's counters."""
        drafts = self.metrics["vllm:spec_decode_num_drafts"]
        return 1 + self.metrics["vllm:spec_decode_num_accepted_tokens"] / max(drafts, 1)


@contextlib.contextmanager
def engine(
    pair: str,
    spec: dict[str, Any] | None = None,
    *,
    async_scheduling: bool = False,
    processes: bool = False,
    fresh: bool = False,
    kernels: str = "auto",
    trace: Path | None = None,
    **kwargs: Any,
) -> Iterator[LLM]:
    """An engine on one of the PAIRS; ``spec`` holds the griffin fields besides method and model.

    ``fresh``: processes of the engine start as a user's do, and import vLLM by themselves.
    """
    target, draft = PAIRS[pair]
    arguments: dict[str, Any] = {
        "model": str(target),
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "disable_log_stats": False,
        "seed": 0,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
    } | kwargs
    if spec is not None:
        arguments["speculative_config"] = {"method": "griffin", "model": str(draft)} | spec
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if processes else "0",
        "VLLM_GRIFFIN_KERNELS": kernels,
        "VLLM_GRIFFIN_TRACE": str(trace) if trace else "",
        # It would override the size in the arguments, and counts in GiB.
        "VLLM_CPU_KVCACHE_SPACE": None,
    }
    starting = contextlib.nullcontext() if fresh else forked_processes()
    with environ(environment), cpu_async_scheduling(async_scheduling), starting:
        llm = LLM(**arguments)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


@contextlib.contextmanager
def environ(values: dict[str, str | None]) -> Iterator[None]:
    """Sets environment variables for a while, or unsets those that are None."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def cpu_async_scheduling(wanted: bool) -> Iterator[None]:
    """vLLM's CPU platform turns async scheduling off; a test turns it back on."""
    if not wanted:
        yield
        return
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.__dict__["check_and_update_config"]

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original.__func__(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = original


def add(llm: LLM, request: Request) -> None:
    """Hands one request to the engine."""
    prompt = {"prompt_token_ids": request.prompt}
    llm.llm_engine.add_request(request.name, prompt, request.params, priority=request.priority)


def run(llm: LLM, requests: list[Request]) -> Outcome:
    """Adds each request before its step and steps the engine until all have finished."""
    outcome = Outcome()
    core = llm.llm_engine
    waiting = sorted(requests, key=lambda r: r.arrival)
    deltas = {r.name for r in requests if r.params.output_kind == RequestOutputKind.DELTA}
    while waiting or core.has_unfinished_requests():
        while waiting and (
            waiting[0].arrival <= outcome.steps or not core.has_unfinished_requests()
        ):
            request = waiting.pop(0)
            add(llm, request)
        for output in core.step():
            name = output.request_id
            if name in outcome.outputs:
                outcome.outputs[name].add(output, aggregate=name in deltas)
            else:
                outcome.outputs[name] = output
            if output.finished:
                outcome.tokens[name] = list(outcome.outputs[name].outputs[0].token_ids)
        outcome.steps += 1
    outcome.metrics = {
        m.name: getattr(m, "value", getattr(m, "values", None)) for m in llm.get_metrics()
    }
    return outcome


def golden_prompts(case: str) -> list[dict[str, Any]]:
    """The golden case's prompts with everything that is expected of them, without index prefix."""
    tensors = load_file(GOLDEN / case / "expected.safetensors")
    prefixes = sorted({name.split(".")[0] for name in tensors})
    return [
        {n.split(".", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{p}.")}
        for p in prefixes
    ]


def tree_paths(tokens: list[int], parents: list[int]) -> set[tuple[int, ...]]:
    """A tree as the set of its root-to-node token paths, the root's own token left out."""
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return set(paths)


def random_prompt(generator: torch.Generator, length: int, vocab_size: int) -> list[int]:
    """Token ids without the first four, which may be special."""
    return torch.randint(4, vocab_size, (length,), generator=generator).tolist()
