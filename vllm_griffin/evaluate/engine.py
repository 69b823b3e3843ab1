"""Evaluation in vLLM: answers of a plain engine, and verify steps of this plugin's engine from its trace."""

import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_griffin.compat import INSTALL, install_command_patches
from vllm_griffin.data.engine import prepare_environment
from vllm_griffin.evaluate.outputs import TAIL, Output
from vllm_griffin.evaluate.prompts import Prompt
from vllm_griffin.evaluate.steps import PromptSteps, steps_of_trace
from vllm_griffin.trace import TraceRecord, read_trace
from vllm_griffin.tree_shape import TreeShape

if TYPE_CHECKING:
    from vllm import LLM

TRACE = "VLLM_GRIFFIN_TRACE"


class EngineError(RuntimeError):
    """There is no engine, its own counters and its trace disagree, or an evaluation cannot be exact."""


@dataclass(frozen=True)
class EngineSettings:
    """What all engines of an evaluation share.

    Attributes:
        target: Folder or hub id.
        context: The target's longest text in tokens.
        max_tokens: New tokens per prompt.
        dtype: vLLM's `dtype`; replay needs float32 to be exact.
        batch: Requests at a time.
    """

    target: str
    context: int
    max_tokens: int
    dtype: str = "float32"
    batch: int = 8
    draft_vocab_size: int | None = None


def prepare_process() -> None:
    """Set what vLLM reads when it is imported: its engine in this process, on a CPU where there is no GPU.

    Raises:
        EngineError: An engine on a CPU needs Triton, and it is missing or was imported too early.
        ValueError: The environment contradicts itself.
    """
    try:
        prepare_environment(threads=None)
    except RuntimeError as error:
        raise EngineError(str(error)) from error
    # Its trace and its counters are read here.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def _longest(settings: EngineSettings, prompts: Sequence[Sequence[int]], extra: int) -> int:
    """Context for which no tree is trimmed before the target's own context ends."""
    return min(settings.context, max(map(len, prompts)) + settings.max_tokens + extra)


@contextmanager
def _engine(
    settings: EngineSettings, max_model_len: int, shape: TreeShape | None, draft: str | None
) -> Iterator["LLM"]:
    """An engine without prefix caching and asynchronous scheduling: both schedule steps without a tree.

    Raises:
        EngineError: vLLM is not installed, or cannot run the target.
        torch.OutOfMemoryError: The target does not fit on the GPU.
    """
    try:
        from vllm import LLM
    except ImportError as error:
        raise EngineError(f"this needs vLLM ({INSTALL}): {error}") from error

    install_command_patches()
    rows = 1 + (shape.nodes if shape else 0)
    try:
        llm = LLM(
            settings.target,
            dtype=settings.dtype,  # type: ignore[arg-type]
            enforce_eager=True,
            max_model_len=max_model_len,
            max_num_seqs=settings.batch,
            # Twice the trees of a full batch: no tree is trimmed for want of budget.
            max_num_batched_tokens=max(2048, 2 * settings.batch * rows),
            enable_prefix_caching=False,
            async_scheduling=False,
            disable_log_stats=False,
            seed=0,
            speculative_config=(
                shape.speculative_config(draft, settings.draft_vocab_size)
                if shape and draft
                else None
            ),
        )
    except torch.OutOfMemoryError:  # the command says what to lower
        raise
    except RuntimeError as error:
        raise EngineError(str(error)) from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _params(temperature: float, seed: int, max_tokens: int, ignore_eos: bool = False) -> Any:
    """Sampling parameters with every default of a model's generation config overruled."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        seed=seed,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        detokenize=False,
    )


def _run(
    llm: "LLM",
    requests: dict[str, tuple[list[int], Any]],
    finished: Callable[[str], None] = lambda _: None,
) -> dict[str, list[int]]:
    """Request id -> (prompt, parameters) to request id -> new tokens; calls back as requests finish."""
    core = llm.llm_engine
    for name, (tokens, params) in requests.items():
        core.add_request(name, {"prompt_token_ids": tokens}, params)
    answers: dict[str, list[int]] = {}
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)  # type: ignore[union-attr, index]
                finished(output.request_id)
    return answers


def _outputs(
    wanted: Sequence[tuple[Prompt, float]], answers: dict[str, list[int]], max_tokens: int
) -> dict[str, Output]:
    return {
        str(i): Output(
            id=prompt.id,
            temperature=temperature,
            prompt_token_ids=prompt.tokens,
            response_token_ids=answers[str(i)],
            set=prompt.set,
            seed=prompt.id,
            max_tokens=max_tokens,
        )
        for i, (prompt, temperature) in enumerate(wanted)
    }


def generate(
    settings: EngineSettings,
    wanted: Sequence[tuple[Prompt, float]],
    store: Callable[[list[Output]], None],
    finished: Callable[[str], None] = lambda _: None,
) -> None:
    """Answer prompts at temperatures without speculation, and store answers with their tails part by part.

    A tail is the answer's own continuation with end-of-sequence ignored: noise is keyed by seed and
    position, so asking again with the answer as part of the prompt goes on as the engine would.
    """
    max_model_len = _longest(settings, [p.tokens for p, _ in wanted], TAIL + 1)
    with _engine(settings, max_model_len, None, None) as llm:
        for part in _parts(settings, wanted):
            asked = {
                str(i): (prompt.tokens, _params(temperature, prompt.id, settings.max_tokens))
                for i, (prompt, temperature) in enumerate(part)
            }
            outputs = _outputs(part, _run(llm, asked, finished), settings.max_tokens)
            more = {
                name: (o.text, _params(o.temperature, o.id, TAIL, ignore_eos=True))
                for name, o in outputs.items()
                if o.end < max_model_len
            }
            for name, tail in _run(llm, more).items():
                outputs[name].tail_token_ids = tail
            store(list(outputs.values()))


@dataclass
class EngineRun:
    """What one engine with a draft made of its prompts."""

    outputs: list[Output]
    prompts: list[PromptSteps]


def evaluate_in_engine(
    settings: EngineSettings,
    draft: str,
    shape: TreeShape,
    wanted: Sequence[tuple[Prompt, float]],
    finished: Callable[[str], None] = lambda _: None,
    store: Callable[[Sequence[Prompt], list[PromptSteps]], None] = lambda *_: None,
) -> EngineRun:
    """Answer prompts at temperatures with a draft part by part, and read the verify steps off the trace.

    Raises:
        EngineError: vLLM's counters differ from the trace, or requests were preempted; or as `_engine`.
    """
    # The last step may reach past the answer: leave it room for a whole tree.
    max_model_len = _longest(settings, [p.tokens for p, _ in wanted], shape.nodes + 2)
    result = EngineRun([], [])
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "trace.jsonl"
        before = os.environ.get(TRACE)
        os.environ[TRACE] = str(file)
        try:
            with _engine(settings, max_model_len, shape, draft) as llm:
                records: list[TraceRecord] = []
                for part in _parts(settings, wanted):
                    asked = {
                        str(i): (p.tokens, _params(temperature, p.id, settings.max_tokens))
                        for i, (p, temperature) in enumerate(part)
                    }
                    outputs = _outputs(part, _run(llm, asked, finished), settings.max_tokens)
                    more = read_trace(file)
                    # Its writer appends.
                    os.truncate(file, 0)
                    records += more
                    check_counters(_counters(llm), records)
                    steps = steps_of_trace(more, outputs)
                    store([prompt for prompt, _ in part], steps)
                    result.outputs += outputs.values()
                    result.prompts += steps
        finally:
            if before is None:
                del os.environ[TRACE]
            else:
                os.environ[TRACE] = before
    return result


def _parts(
    settings: EngineSettings, wanted: Sequence[tuple[Prompt, float]]
) -> Iterator[Sequence[tuple[Prompt, float]]]:
    """What is stored at one time: some batches, so that few requests wait for a part's last."""
    size = 4 * settings.batch
    for first in range(0, len(wanted), size):
        yield wanted[first : first + size]


def _counters(llm: "LLM") -> dict[str, Any]:
    """vLLM's own counts; `per_depth` are steps that accepted at least 1, 2, .. tokens."""
    values = {m.name: getattr(m, "value", getattr(m, "values", None)) for m in llm.get_metrics()}
    names = {
        "steps": "vllm:spec_decode_num_drafts",
        "drafted": "vllm:spec_decode_num_draft_tokens",
        "accepted": "vllm:spec_decode_num_accepted_tokens",
        "per_depth": "vllm:spec_decode_num_accepted_tokens_per_pos",
        "preemptions": "vllm:num_preemptions",
    }
    return {name: values[metric] for name, metric in names.items()}


def check_counters(counters: dict[str, Any], records: Sequence[TraceRecord]) -> None:
    """Compare vLLM's counters with a trace.

    Raises:
        EngineError: They differ, or there were preemptions, after which a step has no tree.
    """
    if counters["preemptions"]:
        raise EngineError(
            f"{counters['preemptions']} requests were preempted for want of KV cache: lower --batch "
            f"or give vLLM more memory (VLLM_CPU_KVCACHE_SPACE on a CPU)"
        )
    accepted = [len(record.accepted) - 1 for record in records]
    depths = range(1, len(counters["per_depth"]) + 1)
    traced = {
        "steps": len(records),
        "drafted": sum(record.num_drafted for record in records),
        "accepted": sum(accepted),
        "per_depth": [sum(a >= d for a in accepted) for d in depths],
    }
    wrong = [
        f"{name} {counters[name]} against {traced[name]}"
        for name in traced
        if counters[name] != traced[name]
    ]
    if wrong:
        raise EngineError(
            f"vLLM's counters differ from the trace, a bug to report: {'; '.join(wrong)}"
        )
