"""One vLLM engine in a process of its own, which a benchmark asks to generate: engines can take turns.

    python benchmarks/engine_process.py OPTIONS     (JSON: arguments of `LLM`)

A request is a line of JSON on standard input, an answer one on standard output; see `Engine`.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch


@dataclass(frozen=True)
class Decoding:
    """Steps in which all requests of a batch decode: their number, seconds in all, tokens in all."""

    steps: int
    seconds: float
    tokens: int
    # median of a step, and of the drafting in it; None without drafts
    step_ms: float
    draft_ms: float | None


class Engine:
    """The parent's side of an engine process.

    Args:
        options: Arguments of `LLM`.
        environment: Environment variables; None takes one away.
        log: Where the engine's own output goes.

    Attributes:
        cache_tokens: Tokens whose keys and values fit into the engine's cache.
    """

    def __init__(
        self, options: dict[str, Any], environment: dict[str, str | None], log: Path
    ) -> None:
        environ = {k: v for k, v in (os.environ | environment).items() if v is not None}
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)],
            env=environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self.cache_tokens: int = self._receive()["cache_tokens"]

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        steps: int | None = None,
        **sampling: Any,
    ) -> Decoding:
        """Run the prompts as one batch for `max_tokens` tokens each, whatever they are.

        With `steps`, only until so many steps have been timed.
        """
        request = {
            "prompts": prompts, "max_tokens": max_tokens, "steps": steps, "sampling": sampling
        }  # fmt: skip
        self._pipe(self.process.stdin).write(json.dumps(request) + "\n")
        self._pipe(self.process.stdin).flush()
        return Decoding(**self._receive())

    def close(self) -> None:
        """End the engine."""
        self._pipe(self.process.stdin).close()
        self.process.wait(60)

    def _receive(self) -> dict[str, Any]:
        line = self._pipe(self.process.stdout).readline()
        if not line:
            last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"the engine has ended ({self.log}): {' '.join(last)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def serve(options: dict[str, Any]) -> None:
    """The engine's side."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM

    llm = LLM(**options)
    cache = llm.llm_engine.vllm_config.cache_config
    room = {"cache_tokens": cache.num_gpu_blocks * cache.block_size}
    print(json.dumps(room), file=answers, flush=True)
    drafting = DraftTimer(llm)
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        print(json.dumps(_decode(llm, drafting, number, **request)), file=answers, flush=True)


class DraftTimer:
    """How long the engine's speculator takes: on a GPU by its own clock, elsewhere by the host's."""

    def __init__(self, llm: Any) -> None:
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        speculator = getattr(executor.driver_worker.worker.model_runner, "speculator", None)
        # Of each call: events of the device, or seconds.
        self._calls: list[tuple[Any, Any]] = []
        if speculator is None:
            return
        propose = speculator.propose
        mark: Any = self._event if torch.cuda.is_available() else time.perf_counter

        def timed(*arguments: Any, **named: Any) -> Any:
            begin = mark()
            drafts = propose(*arguments, **named)
            self._calls.append((begin, mark()))
            return drafts

        speculator.propose = timed

    def start(self) -> None:
        """Forget what was timed."""
        self._calls.clear()

    def median_ms(self, calls: int) -> float | None:
        """Of so many calls since the start; None if there was none."""
        timed = self._calls[:calls]
        if not timed:
            return None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return statistics.median(begin.elapsed_time(end) for begin, end in timed)
        return statistics.median(1000 * (end - begin) for begin, end in timed)

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _decode(
    llm: Any,
    drafting: DraftTimer,
    number: int,
    prompts: list[list[int]],
    max_tokens: int,
    steps: int | None,
    sampling: dict[str, Any],
) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        **sampling,
    )
    engine = llm.llm_engine
    names = [f"{number}-{i}" for i in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    started: set[str] = set()
    times: list[float] = []
    tokens = 0
    finished = False
    while engine.has_unfinished_requests():
        if len(started) == len(prompts) and not times:
            drafting.start()
        begin = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - begin
        new = sum(len(o.outputs[0].token_ids) for o in outputs)
        if len(started) == len(prompts) and not finished:
            times.append(seconds)
            tokens += new
        started |= {o.request_id for o in outputs if o.outputs[0].token_ids}
        # The batch shrinks from here on.
        finished |= any(o.finished for o in outputs)
        if len(times) == steps:
            engine.abort_request(names)
    llm.reset_prefix_cache()
    if not times:
        raise ValueError(f"max_tokens={max_tokens} leaves no step in which all requests decode")
    return {
        "steps": len(times),
        "seconds": sum(times),
        "tokens": tokens,
        "step_ms": 1000 * sorted(times)[len(times) // 2],
        "draft_ms": drafting.median_ms(len(times)),
    }


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
