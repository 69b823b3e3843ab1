"""A wrong request is refused where it is added, and those in flight do not notice.

The table is name -> (sampling parameters, prompt and other arguments, vLLM's own sentence).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import LLM, PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.worker.gpu.sample import logit_bias

from tests.bad_input.sentences import assert_sentence
from tests.engine.harness import Outcome, Request, engine, random_prompt, run
from tests.engine.ties import assert_lossless, recorded_gaps
from vllm_griffin import request_limits

VOCABULARY, CONTEXT = 2048, 128
SPEC = {"num_speculative_tokens": 12, "tree_depth": 4, "tree_top_k": 4}
NAN = float("nan")


def grammar(**constraint: Any) -> Callable[[], dict[str, Any]]:
    """Made when the request is, since some cannot be made."""
    return lambda: {"structured_outputs": StructuredOutputsParams(**constraint)}


PARAMETERS: dict[str, tuple[Any, str]] = {
    "no outputs": ({"n": 0}, "n must be at least 1, got 0."),
    "half an output": ({"n": 1.5}, "n must be an int, but is of type <class 'float'>"),
    "greedy twice": (
        {"n": 2, "temperature": 0},
        "n must be 1 when using greedy sampling, got 2.",
    ),
    "too many outputs": ({"n": 10**9}, "n must be at most 16384, got 1000000000. ..."),
    "cold below 0": ({"temperature": -1}, "temperature must be non-negative, got -1. ..."),
    "temperature NaN": ({"temperature": NAN}, "temperature must be a finite number, got nan. ..."),
    "too hot": ({"temperature": 9.0}, "temperature must be in [0, 2], got 9.0. ..."),
    "top-p 0": ({"top_p": 0}, "top_p must be in (0, 1], got 0. ..."),
    "top-p NaN": ({"top_p": NAN}, "top_p must be in (0, 1], got nan. ..."),
    "top-k below 0": ({"top_k": -2}, "top_k must be 0 (disable), or at least 1, got -2."),
    "top-k a fraction": ({"top_k": 1.5}, "top_k must be an integer, got float"),
    "min-p above 1": ({"min_p": 2}, "min_p must be in [0, 1], got 2."),
    "bias of no token": (
        {"logit_bias": {99999: 1.0}},
        "token_id(s) [99999] in logit_bias contain out-of-vocab token ids. ...",
    ),
    "presence 3": ({"presence_penalty": 3}, "presence_penalty must be in [-2, 2], got 3."),
    "frequency -3": ({"frequency_penalty": -3}, "frequency_penalty must be in [-2, 2], got -3."),
    "repetition 0": (
        {"repetition_penalty": 0},
        "repetition_penalty must be greater than zero, got 0.",
    ),
    "repetition infinite": (
        {"repetition_penalty": float("inf")},
        "repetition_penalty must be a finite number, got inf.",
    ),
    "no tokens": ({"max_tokens": 0}, "max_tokens must be at least 1, got 0. ..."),
    "least above most": (
        {"min_tokens": 30, "max_tokens": 3},
        "min_tokens must be less than or equal to max_tokens=3, got 30.",
    ),
    "logprobs -2": ({"logprobs": -2}, "logprobs must be non-negative or -1, got -2. ..."),
    "logprobs 1000": (
        {"logprobs": 1000},
        "Requested sample logprobs of 1000, which is greater than max allowed: 20 ...",
    ),
    "prompt logprobs 1000": (
        {"prompt_logprobs": 1000},
        "Requested prompt logprobs of 1000, which is greater than max allowed: 20 ...",
    ),
    "logprobs of no token": (
        {"logprob_token_ids": [-1]},
        "token_id(s) [-1] in logprob_token_ids contain out-of-vocab token ids. ...",
    ),
    "empty stop": ({"stop": [""]}, "stop cannot contain an empty string."),
    "stop without text": (
        {"stop": ["a"], "detokenize": False},
        "stop strings are only supported when detokenize is True. ...",
    ),
    "stop at a word": (
        {"stop_token_ids": ["a"]},
        "stop_token_ids must contain only integers, got ['a'].",
    ),
    "stop at no token": (
        {"stop_token_ids": [99999]},
        "token_id(s) [99999] in stop_token_ids contain out-of-vocab token ids. ...",
    ),
    "empty bad word": (
        {"bad_words": [""]},
        "bad_words cannot contain an empty string. Got bad_words=['']",
    ),
    "nothing allowed": (
        {"allowed_token_ids": []},
        "allowed_token_ids is not None and empty! ...",
    ),
    "no token allowed": (
        {"allowed_token_ids": [-1]},
        "allowed_token_ids contains out-of-vocab token id! ...",
    ),
    "thinking budget": (
        {"thinking_token_budget": 3},
        "thinking_token_budget is set but reasoning_config is not configured. ...",
    ),
    "a trace to repeat": (
        {"trace_decode_token_ids": [5]},
        "trace_decode_token_ids is not supported with speculative decoding.",
    ),
    "stream of nothing": ({"stream_interval": 0}, "stream_interval must be at least 1, got 0. ..."),
    "extra number too long": (
        {"extra_args": {"a": 2**80}},
        "extra_args integers must be between -2**63 and 2**64 - 1. ...",
    ),
    "seed beyond 64 bits": (
        {"seed": 2**63},
        "seed must be an integer between -9223372036854775808 ...",
    ),
    "last seed beyond 64 bits": (
        {"seed": 2**63 - 1, "n": 2},
        "seed must be an integer between ... and 9223372036854775806 for n=2, got ...",
    ),
    "a word as seed": ({"seed": "a"}, "seed must be an integer between ... got 'a' ..."),
    "endless": (
        {"max_tokens": 2**40},
        "max_tokens=1099511627776 and a prompt of ... tokens exceed a text's longest length, ...",
    ),
    "at least endless": (
        {"max_tokens": None, "min_tokens": 2**31},
        "min_tokens must be less than or equal to max_tokens=..., got 2147483648.",
    ),
    "too many allowed": (
        {"allowed_token_ids": list(range(1025))},
        "allowed_token_ids has 1025 tokens and a request can have 1024: name fewer ...",
    ),
    "too many biased": (
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        "logit_bias has 1025 tokens and a request can have 1024: name fewer ...",
    ),
    "too many stops": (
        {"stop_token_ids": list(range(3, 132)), "min_tokens": 2},
        "stop_token_ids has ... tokens beside min_tokens, end tokens included, and a request can ...",
    ),
    "too many bad words": (
        {"bad_words": ["the other one " * 80, "abc def " * 300]},
        "bad_words has ... tokens in all and a request can have 1024: name fewer ...",
    ),
    "no constraint": (
        grammar(),
        "You must use one kind of structured outputs constraint but none are specified: ...",
    ),
    "two constraints": (
        grammar(regex="a", choice=["b"]),
        "You can only use one kind of structured outputs constraint but multiple are ...",
    ),
    "empty grammar": (
        grammar(grammar=""),
        "structured_outputs.grammar cannot be an empty string",
    ),
    "grammar of nothing": (
        grammar(grammar="root ::= nope"),
        "Invalid grammar specification: ... 'nope' not found",
    ),
    "schema of no type": (grammar(json={"type": "nonsense"}), "Grammar error: ... nonsense"),
    "schema not JSON": (grammar(json="{"), "Invalid JSON grammar specification."),
    "no choice": (grammar(choice=[]), "Choice '[]' cannot be an empty list"),
}
PROMPTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": ([], {}, "The decoder prompt cannot be empty"),
    "too long": (
        [5] * 200,
        {},
        "This model's maximum context length is 128 tokens. However, your prompt contains 200 ...",
    ),
    "as long as the context": ([5] * CONTEXT, {}, "The decoder prompt (length 128) ..."),
    "of no token": ([5, 99999], {}, "Token id 99999 is out of vocabulary"),
    "of a token below 0": ([5, -1], {}, "Token id -1 is out of vocabulary"),
    "of another's adapter": (
        [5],
        {"lora_request": LoRARequest("x", 1, "/nowhere")},
        "Got lora_request ... but LoRA is not enabled!",
    ),
    "for pooling": ([5], {"params": PoolingParams()}, "This model does not support pooling"),
    "without parameters": (
        [5],
        {"params": None},
        "params must be either SamplingParams or PoolingParams, but got NoneType",
    ),
}


def good_requests() -> list[Request]:
    """Trees and a spine, greedy and seeded, long enough to be in flight all the while."""
    generator = torch.Generator().manual_seed(5)
    kinds = ({"temperature": 0}, {"seed": 3}, {"seed": 4, "presence_penalty": 1.0})
    requests = []
    for i, fields in enumerate(kinds):
        params = SamplingParams(max_tokens=60, ignore_eos=True, **fields)
        prompt = random_prompt(generator, 4 + 9 * i, VOCABULARY)
        requests.append(Request(f"good-{i}", prompt, params))
    return requests


def wrong_requests(llm: LLM) -> list[tuple[str, str, Callable[[], None]]]:
    """(name, the sentence, what sends it)."""
    add = llm.llm_engine.add_request

    def with_parameters(name: str, fields: Any) -> None:
        given = fields() if callable(fields) else fields
        params = SamplingParams(**({"max_tokens": 4} | given))
        add(name, {"prompt_token_ids": [5, 6, 7]}, params)

    def with_prompt(name: str, prompt: list[int], others: dict[str, Any]) -> None:
        others = {"params": SamplingParams(max_tokens=4)} | others
        add(name, {"prompt_token_ids": prompt}, **others)

    wrong = []
    for name, (fields, sentence) in PARAMETERS.items():
        wrong.append((name, sentence, lambda n=name, f=fields: with_parameters(n, f)))
    for name, (prompt, others, sentence) in PROMPTS.items():
        wrong.append((name, sentence, lambda n=name, p=prompt, o=others: with_prompt(n, p, o)))
    return wrong


@pytest.fixture(scope="module")
def served() -> dict[str, Any]:
    """The good requests alone without griffin, and with griffin among the wrong ones."""
    limits = {"skip_tokenizer_init": False, "max_model_len": CONTEXT, "max_num_seqs": 4}
    with recorded_gaps() as gaps, engine("tiny", **limits) as llm:
        plain = run(llm, good_requests())
    errors: dict[str, BaseException | None] = {}
    griffin, steps_left = Outcome(), 0
    with engine("tiny", SPEC, **limits) as llm:
        core = llm.llm_engine
        wrong = wrong_requests(llm)
        for request in good_requests():
            core.add_request(request.name, {"prompt_token_ids": request.prompt}, request.params)
        while core.has_unfinished_requests():
            for name, _, send in wrong[:5]:
                try:
                    send()
                    errors[name] = None
                except Exception as error:
                    errors[name] = error
            del wrong[:5]
            for output in core.step():
                if output.finished:
                    griffin.tokens[output.request_id] = list(output.outputs[0].token_ids)
            steps_left += not wrong
    return {
        "plain": plain,
        "gaps": gaps,
        "griffin": griffin,
        "errors": errors,
        "steps_left": steps_left,
    }


@pytest.mark.parametrize("name", [*PARAMETERS, *PROMPTS])
def test_request_is_refused_in_one_sentence(name: str, served: dict[str, Any]) -> None:
    expected = (PARAMETERS | PROMPTS)[name][-1]
    error = served["errors"][name]
    assert error is not None, "it was taken"
    assert_sentence(error, expected)


def test_limits_are_the_workers() -> None:
    assert request_limits.MOST_ALLOWED_TOKENS == logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS
    assert request_limits.MOST_BIASED_TOKENS == logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS
    assert request_limits.MOST_STOP_TOKENS == logit_bias.MAX_NUM_STOP_TOKEN_IDS


def test_as_much_as_the_worker_holds_is_taken() -> None:
    params = SamplingParams(
        seed=request_limits.SMALLEST_SEED,
        max_tokens=request_limits.LONGEST_TEXT - 7,
        min_tokens=1,
        allowed_token_ids=list(range(1024)),
        logit_bias=dict.fromkeys(range(1024), 1.0),
        stop_token_ids=list(range(128)),
    )
    request_limits.check_request(params, prompt_tokens=7)


def test_requests_in_flight_do_not_notice(served: dict[str, Any]) -> None:
    assert served["steps_left"] > 2, "the good requests were over too soon"
    assert_lossless(good_requests(), served["plain"], served["gaps"], served["griffin"])
