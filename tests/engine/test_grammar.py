"""A grammar constrains a request on its spine, beside free requests in the same batch."""

import re

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.harness import Outcome, Request, engine, run
from tests.engine.ties import assert_lossless, recorded_gaps

SPEC = {"num_speculative_tokens": 12, "tree_depth": 6, "tree_top_k": 4}
PATTERN = r"def [a-z_]{2,8}\(self(, [a-z]{1,6}){0,3}\):"


def _requests() -> list[Request]:
    grammar = {"structured_outputs": StructuredOutputsParams(regex=PATTERN)}
    kinds = {
        "regex": {"temperature": 0} | grammar,
        "free": {"temperature": 0},
        "regex-seeded": {"temperature": 1.0, "seed": 4} | grammar,
        "bad-words": {"temperature": 0, "bad_words": ["self", "return"]},
        "free-seeded": {"temperature": 1.0, "seed": 5},
    }
    prompt = list(range(300, 340))
    return [
        Request(name, prompt[: 20 + 3 * i], SamplingParams(max_tokens=24, **fields), arrival=i)
        for i, (name, fields) in enumerate(kinds.items())
    ]


@pytest.fixture(scope="module")
def runs() -> tuple[Outcome, dict, Outcome]:
    requests = _requests()
    with recorded_gaps() as gaps, engine("tiny", skip_tokenizer_init=False) as llm:
        plain = run(llm, requests)
    with engine("tiny", SPEC, skip_tokenizer_init=False) as llm:
        griffin = run(llm, _requests())
    return plain, gaps, griffin


def test_constrained_and_free_requests_are_lossless(runs: tuple) -> None:
    plain, gaps, griffin = runs
    assert_lossless(_requests(), plain, gaps, griffin)
    assert griffin.acceptance_length > 1


@pytest.mark.parametrize("name", ["regex", "regex-seeded"])
def test_outputs_are_in_the_grammar(runs: tuple, name: str) -> None:
    output = runs[2].outputs[name].outputs[0]
    complete = re.fullmatch(PATTERN, output.text)
    assert complete or output.finish_reason == "length", output.text
    assert output.text.startswith("def ")
