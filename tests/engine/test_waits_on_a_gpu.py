"""A step of griffin's never waits for the GPU, by CUDA's own account."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.engine.harness import Request, engine, run
from vllm_griffin.runner.model_state import GriffinModelState
from vllm_griffin.runner.sampler import TreeVerifier
from vllm_griffin.runner.speculator import TreeSpeculator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="asks CUDA")

PARTS = (
    (GriffinModelState, "prepare_inputs"),
    (GriffinModelState, "prepare_attn"),
    (TreeVerifier, "__call__"),
    (TreeSpeculator, "propose"),
)


def test_no_part_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = False
    called: set[str] = set()

    def watched(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(part)
        def call(*arguments: Any, **named: Any) -> Any:
            if not strict:
                return part(*arguments, **named)
            called.add(name)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return part(*arguments, **named)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    for owner, name in PARTS:
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, detokenize=False)
    requests = [Request(f"r{i}", list(range(7 + i, 40 + i)), params) for i in range(3)]
    with engine("tiny", {"num_speculative_tokens": 12}) as llm:
        # Kernels are compiled in the first steps.
        run(llm, requests)
        strict = True
        outcome = run(llm, [Request(f"s{r.name}", r.prompt, r.params) for r in requests])
    assert called == {name for _, name in PARTS}
    assert outcome.acceptance_length > 1
