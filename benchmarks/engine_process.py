"""One vLLM engine in a process of its own, which a benchmark asks to generate: engines can take turns.

    python benchmarks/engine_process.py OPTIONS     (JSON: arguments of `LLM`)

A request is a line of JSON on standard input, an answer one on standard output; see `Engine`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Decoding:
    """Steps in which all requests of a batch decode: their number, seconds in all, tokens in all."""

    steps: int
    seconds: float
    tokens: int
    # median of a step
    step_ms: float


class Engine:
    """The parent's side of an engine process.

    Args:
        options: Arguments of `LLM`.
        environment: Environment variables; None takes one away.
        log: Where the engine's own output goes.
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
        self._receive()

    def decode(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, **sampling: Any
    ) -> Decoding:
        """Run the prompts as one batch for `max_tokens` tokens each, whatever they are."""
        request = {"prompts": prompts, "max_tokens": max_tokens, "sampling": sampling}
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
    print(json.dumps({}), file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        print(json.dumps(_decode(llm, number, **request)), file=answers, flush=True)


def _decode(
    llm: Any, number: int, prompts: list[list[int]], max_tokens: int, sampling: dict[str, Any]
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
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{number}-{i}", {"prompt_token_ids": prompt}, params)
    started: set[str] = set()
    times: list[float] = []
    tokens = 0
    finished = False
    while engine.has_unfinished_requests():
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
    llm.reset_prefix_cache()
    if not times:
        raise ValueError(f"max_tokens={max_tokens} leaves no step in which all requests decode")
    return {
        "steps": len(times),
        "seconds": sum(times),
        "tokens": tokens,
        "step_ms": 1000 * sorted(times)[len(times) // 2],
    }


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
