"""Requests of every kind in one batch: trees, spines, log-probabilities, reused slots."""

import dataclasses
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.harness import Outcome, Request, engine, random_prompt, run
from tests.engine.oracle import oracle_trees
from tests.engine.ties import assert_lossless, recorded_gaps
from vllm_griffin.runner.model_state import reads_history
from vllm_griffin.trace import read_trace

PAIR, VOCABULARY = "golden-a", 512
SPEC = {"num_speculative_tokens": 12, "tree_depth": 6, "tree_top_k": 4}
COMMON = {"max_tokens": 16, "ignore_eos": True, "detokenize": False}
KINDS = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "seed": 5},
    "cold": {"temperature": 0.5, "seed": 6, "top_p": 0.8},
    "presence": {"temperature": 0, "presence_penalty": 1.5},
    "frequency": {"temperature": 1.0, "seed": 7, "frequency_penalty": 1.0},
    "repetition": {"temperature": 0, "repetition_penalty": 1.7},
    "allowed": {"temperature": 1.0, "seed": 8, "allowed_token_ids": list(range(20, 60))},
    "min-tokens": {"temperature": 0, "min_tokens": 8, "stop_token_ids": list(range(0, 512, 5))},
    "logprobs": {"temperature": 0, "logprobs": 5},
    "seeded-logprobs": {"temperature": 1.0, "seed": 9, "logprobs": 2, "prompt_logprobs": 1},
    "token-logprobs": {"temperature": 0, "logprob_token_ids": [3, 5, 7]},
}
SPINES = {"presence", "frequency", "repetition"}


def _requests() -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    requests = []
    for i, (name, fields) in enumerate(KINDS.items()):
        params = SamplingParams(**(COMMON | fields))
        prompt = random_prompt(generator, 5 + 7 * i, VOCABULARY)
        requests.append(Request(name, prompt, params, arrival=i // 2))
    return requests


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, dict, Outcome, Path]:
    """The same mixed batch without and with griffin."""
    requests = _requests()
    with recorded_gaps() as gaps, engine(PAIR) as llm:
        plain = run(llm, requests)
    texts = {r.name: r.prompt + plain.tokens[r.name] for r in requests}
    trace = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    with engine(PAIR, SPEC, trace=trace) as llm, oracle_trees(texts, VOCABULARY):
        griffin = run(llm, requests)
    return plain, gaps, griffin, trace


def test_mixed_batch_is_lossless(runs: tuple) -> None:
    plain, gaps, griffin, _ = runs
    assert_lossless(_requests(), plain, gaps, griffin)


def test_history_readers_accept_along_their_spine_only(runs: tuple) -> None:
    *_, trace = runs
    records = read_trace(trace)
    off_spine = {r.request_id for r in records if r.accepted != list(range(len(r.accepted)))}
    beyond = {r.request_id for r in records if len(r.accepted) > 1}
    assert not off_spine & SPINES
    assert off_spine >= {"greedy", "seeded"}
    assert beyond & SPINES, "a spine that is never accepted proves nothing"


@pytest.mark.parametrize("name", ["logprobs", "seeded-logprobs", "token-logprobs"])
def test_logprobs_are_those_of_the_accepted_rows(runs: tuple, name: str) -> None:
    plain, _, griffin, _ = runs
    expected, found = plain.outputs[name].outputs[0], griffin.outputs[name].outputs[0]
    assert expected.token_ids == found.token_ids
    assert len(expected.logprobs) == len(found.logprobs) == len(found.token_ids)
    for a, b in zip(expected.logprobs, found.logprobs, strict=True):
        assert a.keys() == b.keys()
        for token in a:
            assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)
            assert a[token].rank == b[token].rank


def test_prompt_logprobs_do_not_change(runs: tuple) -> None:
    plain, _, griffin, _ = runs
    expected = plain.outputs["seeded-logprobs"].prompt_logprobs
    found = griffin.outputs["seeded-logprobs"].prompt_logprobs
    for a, b in zip(expected[1:], found[1:], strict=True):
        for token in a:
            assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"min_tokens": 3, "top_k": 4, "top_p": 0.5, "allowed_token_ids": [1]}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"bad_words": ["x"]}, True),
        ({"thinking_token_budget": 3}, True),
        ({"structured_outputs": StructuredOutputsParams(regex="a+")}, False),
    ],
)
def test_which_requests_read_their_history(fields: dict, expected: bool) -> None:
    assert reads_history(SamplingParams(**fields)) is expected


def test_reused_slots_do_not_inherit_trees(tmp_path: Path) -> None:
    """More requests than slots, each ending at another length, so that every slot is reused."""
    generator = torch.Generator().manual_seed(11)
    requests = []
    for i in range(10):
        params = SamplingParams(**(COMMON | {"temperature": 0, "max_tokens": 40 - 9 * (i % 4)}))
        # A prompt of one token that joins decoding requests is scheduled with placeholder drafts.
        prompt = random_prompt(generator, (1, 65, 7)[i % 3], VOCABULARY)
        requests.append(Request(f"slot-{i}", prompt, params, arrival=2 * i))
    limits = {"max_num_seqs": 2}
    with recorded_gaps() as gaps, engine(PAIR, **limits) as llm:
        plain = run(llm, [dataclasses.replace(r) for r in requests])
    texts = {r.name: r.prompt + plain.tokens[r.name] for r in requests}
    trace = tmp_path / "trace.jsonl"
    with engine(PAIR, SPEC, trace=trace, **limits) as llm, oracle_trees(texts, VOCABULARY):
        griffin = run(llm, requests)
    assert_lossless(requests, plain, gaps, griffin)
    # A request's own first tree hangs below its first drawn token.
    prompts = {r.name: len(r.prompt) for r in requests}
    records = read_trace(trace)
    assert records and all(r.position >= prompts[r.request_id] for r in records)
