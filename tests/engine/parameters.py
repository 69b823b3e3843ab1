"""Every sampling parameter of vLLM, with requests that use it.

A row of the equality matrix is one entry of PARAMETERS. Fields that are in none are in NOT_SAMPLING
or REFUSED; a test holds all of them against vLLM's ``SamplingParams``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

Fields = dict[str, Any]
COMMON: Fields = {"max_tokens": 16, "ignore_eos": True, "detokenize": False}
KINDS = (RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY)
TEXT: Fields = {"detokenize": True}


@dataclass(frozen=True)
class Case:
    """The i-th request of a row: vocabulary and end token of its pair, tokens of its prompt."""

    i: int
    size: int
    eos: int
    length: int


@dataclass(frozen=True)
class Parameter:
    """One row: which fields its requests have, and where griffin verifies them.

    Attributes:
        how: "tree", or "spine" if a request accepts along its best chain only.
        needs: "tokenizer" or "processors" if not every engine can run it.
    """

    name: str
    make: Callable[[Case], Fields]
    how: Literal["tree", "spine"] = "tree"
    needs: Literal["tokenizer", "processors"] | None = None

    def fields(self, case: Case) -> Fields:
        """Greedy and seeded by turns, unless the row says more."""
        base: Fields = {"temperature": 0.0} if case.i % 2 == 0 else seeded(case.i)
        return COMMON | base | self.make(case)

    def params(self, case: Case) -> SamplingParams:
        """What the request asks for."""
        return SamplingParams(**self.fields(case))


def seeded(i: int) -> Fields:
    """A sampled request that can be repeated."""
    return {"temperature": 1.0, "seed": 1000 + i}


def _every(c: Case, step: int, first: int = 4) -> list[int]:
    return list(range(first, c.size, step))


def _bias(c: Case) -> Fields:
    tokens = range(4 + c.i, c.size, 31)
    return {"logit_bias": {token: (6.0, -100.0, 3.5)[token % 3] for token in tokens}}


def _likely_eos(c: Case) -> Fields:
    return {"logit_bias": {c.eos: 5.0}, "min_tokens": c.i % 4}


def _prompt_scores(c: Case) -> Fields:
    start = c.i % 2
    if c.length < 2 + start:
        return {}  # no prompt token to score
    ids = [[4 + row, 9] for row in range(c.length - 1 - start)]
    return {"prompt_logprob_token_ids": ids, "prompt_logprob_start": start}


PARAMETERS = (
    Parameter("temperature", lambda c: {"temperature": 0.25 * (c.i % 8), "seed": c.i}),
    Parameter("seed", lambda c: {"temperature": 1.0, "seed": (0, 1, -70, 2**62)[c.i % 4] + c.i}),
    Parameter("top_p", lambda c: seeded(c.i) | {"top_p": (0.2, 0.5, 0.9)[c.i % 3]}),
    Parameter("top_k", lambda c: seeded(c.i) | {"top_k": (1, 3, 40)[c.i % 3]}),
    Parameter("min_p", lambda c: seeded(c.i) | {"min_p": (0.02, 0.2, 0.6)[c.i % 3]}),
    Parameter(
        "top_p, top_k, min_p",
        lambda c: seeded(c.i) | {"top_p": 0.8, "top_k": 30, "min_p": 0.05, "temperature": 1.4},
    ),
    Parameter("logit_bias", _bias),
    Parameter("allowed_token_ids", lambda c: {"allowed_token_ids": _every(c, 9 + c.i)}),
    Parameter("max_tokens", lambda c: {"max_tokens": 1 + 3 * c.i}),
    Parameter("min_tokens", lambda c: {"min_tokens": c.i, "stop_token_ids": _every(c, 3)[:100]}),
    Parameter("stop_token_ids", lambda c: {"stop_token_ids": _every(c, 7, first=c.i)}),
    Parameter("ignore_eos", lambda c: _likely_eos(c) | {"ignore_eos": c.i % 4 == 0}),
    Parameter("n", lambda c: seeded(c.i) | {"n": 2 + c.i % 2}),
    Parameter("logprobs", lambda c: {"logprobs": (0, 1, 5, -1)[c.i % 4]}),
    Parameter("logprob_token_ids", lambda c: {"logprob_token_ids": [3, 5 + c.i, 7 + 2 * c.i]}),
    Parameter("flat_logprobs", lambda c: {"logprobs": 2, "flat_logprobs": True}),
    Parameter("prompt_logprobs", lambda c: {"prompt_logprobs": (0, 3, -1)[c.i % 3]}),
    Parameter("prompt_logprob_token_ids", _prompt_scores),
    Parameter(
        "repetition_detection",
        lambda c: {
            # Few tokens, so that they repeat.
            "allowed_token_ids": _every(c, c.size // 3),
            "repetition_detection": RepetitionDetectionParams(3, 1, 3),
        },
    ),
    Parameter(
        "output_kind",
        lambda c: {
            "output_kind": KINDS[c.i % 3],
            "logprobs": c.i % 3,
            "stream_interval": 1 + c.i % 4,
        },
    ),
    Parameter("skip_reading_prefix_cache", lambda c: {"skip_reading_prefix_cache": c.i % 4 < 2}),
    Parameter("extra_args", lambda c: {"extra_args": {"note": c.i}}),
    Parameter(
        "presence_penalty", lambda c: {"presence_penalty": (1.5, -0.5)[c.i // 2 % 2]}, "spine"
    ),
    Parameter(
        "frequency_penalty", lambda c: {"frequency_penalty": (1.0, -0.3)[c.i // 2 % 2]}, "spine"
    ),
    Parameter(
        "repetition_penalty", lambda c: {"repetition_penalty": (1.7, 0.9)[c.i // 2 % 2]}, "spine"
    ),
    Parameter(
        "logprobs with penalties",
        lambda c: {"repetition_penalty": 1.3, "logprobs": 3, "top_k": 40},
        "spine",
    ),
    Parameter(
        "processor that reads its output",
        lambda c: {"extra_args": {"no_repeat": 2 + c.i}},
        "spine",
        "processors",
    ),
    Parameter(
        "argmax-invariant processor",
        lambda c: {"extra_args": {"sharpen": 1.0 + 0.3 * c.i}},
        "spine",
        "processors",
    ),
    Parameter(
        "stop",
        lambda c: (
            TEXT | {"stop": [[",", "="], ["self"], [")", "e"]][c.i % 3], "min_tokens": c.i % 3}
        ),
        needs="tokenizer",
    ),
    Parameter(
        "include_stop_str_in_output",
        lambda c: TEXT | {"stop": ["e", "("], "include_stop_str_in_output": True, "logprobs": 1},
        needs="tokenizer",
    ),
    Parameter("detokenize", lambda c: {"detokenize": c.i % 4 < 2}, needs="tokenizer"),
    Parameter(
        "skip_special_tokens",
        lambda c: TEXT | {"logit_bias": {c.eos: 4.0}, "skip_special_tokens": c.i % 4 < 2},
        needs="tokenizer",
    ),
    Parameter(
        "spaces_between_special_tokens",
        lambda c: (
            TEXT
            | {
                "logit_bias": {c.eos: 4.0},
                "skip_special_tokens": False,
                "spaces_between_special_tokens": c.i % 4 < 2,
            }
        ),
        needs="tokenizer",
    ),
    Parameter(
        "bad_words", lambda c: {"bad_words": [" self", ")", "return None"]}, "spine", "tokenizer"
    ),
    Parameter(
        "thinking_token_budget", lambda c: {"thinking_token_budget": c.i}, "spine", "tokenizer"
    ),
    Parameter(
        "structured_outputs",
        lambda c: {"structured_outputs": StructuredOutputsParams(regex=r"(def|if) [a-z_]+[:(]")},
        "tree",
        "tokenizer",
    ),
)

# Fields that do not say what is sampled, and why none of them needs a row.
NOT_SAMPLING = {
    "watermarking": "needs the engine's watermark_config, which is refused",
    "routed_experts_prompt_start": "needs enable_return_routed_experts, which is refused",
    "skip_clone": "how vLLM copies the parameters",
    "output_text_buffer_length": "set by vLLM from stop",
    "_eos_token_id": "set by vLLM from the model",
    "_all_stop_token_ids": "set by vLLM from stop_token_ids",
    "_watermarking_skipped": "set by vLLM",
    "_bad_words_token_ids": "set by vLLM from bad_words",
}
# Fields that a request may not set, and what it is told.
REFUSED = {
    "trace_decode_token_ids": "trace_decode_token_ids is not supported with speculative decoding"
}
