"""Requests that would end the worker are refused where they are added.

Model Runner V2 keeps parameters of a request in arrays of fixed size and type. vLLM's front end does not know
their limits; what exceeds them raises in the worker, and all requests in flight end with it.
"""

from numbers import Integral

from vllm import SamplingParams, envs
from vllm.exceptions import VLLMValidationError

# As in vllm.v1.worker.gpu.sample.logit_bias, which a front end should not have to load.
MOST_ALLOWED_TOKENS = 1024
MOST_BIASED_TOKENS = 1024
MOST_STOP_TOKENS = 128
# RequestState.max_seq_len is an int32, a seed an int64.
LONGEST_TEXT = 2**31 - 1
SMALLEST_SEED, LARGEST_SEED = -(2**63), 2**63 - 1


def check_request(params: SamplingParams, prompt_tokens: int) -> None:
    """Refuses what the worker cannot hold.

    Args:
        params: As the engine gets them: end tokens and tokenized bad words are in.
        prompt_tokens: Length of the prompt.

    Raises:
        VLLMValidationError: names the parameter, the limit, and what to do.
    """
    seed = params.seed
    # With n > 1 each completion is a request of its own, with the next seed.
    largest = LARGEST_SEED - (params.n - 1)
    if seed is not None and not (isinstance(seed, Integral) and SMALLEST_SEED <= seed <= largest):
        raise VLLMValidationError(
            f"seed must be an integer between {SMALLEST_SEED} and {largest}"
            f"{f' for n={params.n}' if params.n > 1 else ''}, got {seed!r}",
            parameter="seed",
        )
    # By now it is set, and vLLM has held min_tokens against it.
    if params.max_tokens is not None and prompt_tokens + params.max_tokens > LONGEST_TEXT:
        raise VLLMValidationError(
            f"max_tokens={params.max_tokens} and a prompt of {prompt_tokens} tokens exceed a text's longest "
            f"length, {LONGEST_TEXT}: lower max_tokens",
            parameter="max_tokens",
        )
    bad_words = params.bad_words_token_ids or []
    # Stop tokens are kept only for `min_tokens`, which forbids them for a while.
    stops = params.all_stop_token_ids if params.min_tokens else ()
    for name, what, count, most in (
        ("allowed_token_ids", "tokens", len(params.allowed_token_ids or ()), MOST_ALLOWED_TOKENS),
        ("logit_bias", "tokens", len(params.logit_bias or ()), MOST_BIASED_TOKENS),
        ("stop_token_ids", "tokens beside min_tokens, end tokens included,", len(stops), MOST_STOP_TOKENS),
        ("bad_words", "tokens in all", sum(map(len, bad_words)), envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS),
    ):  # fmt: skip
        if count > most:
            raise VLLMValidationError(
                f"{name} has {count} {what} and a request can have {most}: name fewer",
                parameter=name,
            )
