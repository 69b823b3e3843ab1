"""The comparison behind the equality matrix sees each kind of difference."""

import copy

import pytest
from vllm import SamplingParams
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from tests.engine.compare import difference
from tests.engine.harness import Request

REQUEST = Request("r", [5, 6, 7], SamplingParams())
# The plain engine's second decision was close, the others were not.
GAPS = {("r", 2): 1.0, ("r", 3): 1e-6, ("r", 4): 1.0}


def scores(*values: float) -> dict[int, Logprob]:
    return {10 + i: Logprob(value, rank=1 + i) for i, value in enumerate(values)}


def output() -> RequestOutput:
    completion = CompletionOutput(
        index=0,
        text="abc",
        token_ids=[10, 10, 10],
        cumulative_logprob=None,
        logprobs=[scores(-0.5, -1.5), scores(-0.2, -2.0), scores(-0.1, float("-inf"))],
        finish_reason="stop",
        stop_reason="c",
    )
    prompt = [None, scores(-3.0), scores(-2.0)]
    return RequestOutput("r", None, REQUEST.prompt, prompt, [completion], finished=True)


def test_equal_within_tolerance() -> None:
    found = output()
    found.outputs[0].logprobs[1] = scores(-0.20005, -1.99995)
    assert difference(REQUEST, output(), found, GAPS) is None


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_first_difference_is_excused_at_a_near_tie_only(at: int) -> None:
    found = output()
    found.outputs[0].token_ids[at:] = [11] * (3 - at)
    differs = difference(REQUEST, output(), found, GAPS)
    assert differs is not None and differs.near_tie == (at == 1)


# What is done to an equal output: to its completion, or to the whole of it.
CHANGES = {
    "text": lambda c, o: setattr(c, "text", "abd"),
    "finish reason": lambda c, o: setattr(c, "finish_reason", "length"),
    "stop reason": lambda c, o: setattr(c, "stop_reason", None),
    "log-prob": lambda c, o: c.logprobs.__setitem__(1, scores(-0.2, -2.001)),
    "rank": lambda c, o: setattr(c.logprobs[0][10], "rank", 2),
    "masked": lambda c, o: c.logprobs.__setitem__(2, scores(-0.1, -20.0)),
    "one position less": lambda c, o: c.logprobs.pop(),
    "prompt rows": lambda c, o: o.prompt_logprobs.append(scores(-1.0)),
    "prompt log-prob": lambda c, o: o.prompt_logprobs.__setitem__(1, scores(-3.001)),
    "completions": lambda c, o: o.outputs.append(c),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_other_difference_counts(name: str) -> None:
    found = copy.deepcopy(output())
    CHANGES[name](found.outputs[0], found)
    differs = difference(REQUEST, output(), found, GAPS)
    assert differs is not None and not differs.near_tie
