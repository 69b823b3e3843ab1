"""Random sampling parameters and tree settings against the engine without speculation."""

import random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

from tests.engine.compare import difference
from tests.engine.harness import PAIRS, Request, engine, run
from tests.engine.ties import recorded_gaps
from tests.load.traffic import source_code
from vllm_griffin.tree_shape import max_tree_nodes

VOCABULARY = 2048
TOKENS = st.integers(4, VOCABULARY - 1)
# An odd token is always allowed and never a stop token: with no token left nothing is defined.
STOPS = st.integers(2, VOCABULARY // 2 - 1).map(lambda half: 2 * half)
# Prompts take several chunks, and the cache is too small for all requests.
LIMITS = {
    "max_num_batched_tokens": 64,
    "max_model_len": 192,
    "max_num_seqs": 6,
    "num_gpu_blocks_override": 14,
    "block_size": 32,
}
OPTIONAL = {
    "top_p": st.floats(0.05, 1.0),
    "top_k": st.integers(1, VOCABULARY),
    "min_p": st.floats(0.0, 0.5),
    "presence_penalty": st.floats(-2.0, 2.0),
    "frequency_penalty": st.floats(-2.0, 2.0),
    "repetition_penalty": st.floats(0.5, 2.0),
    "logit_bias": st.dictionaries(TOKENS, st.floats(-100.0, 20.0), max_size=30),
    "allowed_token_ids": st.sets(TOKENS, max_size=200).map(lambda ids: sorted({*ids, 5})),
    "stop_token_ids": st.lists(STOPS, max_size=60, unique=True),
    "min_tokens": st.integers(0, 8),
    "logprobs": st.integers(0, 5),
    "n": st.integers(2, 3),
}


@st.composite
def trees(draw: st.DrawFn) -> dict[str, int]:
    """Any tree of up to 24 nodes; one level and chains among them."""
    depth, top_k = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    nodes = draw(st.integers(1, min(24, max_tree_nodes(depth, top_k))))
    return {"num_speculative_tokens": nodes, "tree_depth": depth, "tree_top_k": top_k}


@st.composite
def fields(draw: st.DrawFn) -> dict:
    """Sampling parameters of one request: each is there or not."""
    found = draw(st.fixed_dictionaries({}, optional=OPTIONAL))
    found["max_tokens"] = draw(st.integers(8, 20))
    found["seed"] = draw(st.integers(0, 2**40))
    found["temperature"] = draw(st.just(0.0) | st.floats(0.1, 2.0))
    if found["temperature"] == 0.0:
        # A greedy request has one completion.
        found.pop("n", None)
    return found | {"ignore_eos": draw(st.booleans()), "detokenize": False}


CLIENTS = st.lists(
    st.tuples(fields(), st.integers(0, 2**20), st.integers(0, 12)), min_size=8, max_size=16
)


def _differences(tree: dict[str, int], clients: list, asynchronous: bool) -> list[str]:
    """What differs in words; two engines run, one after the other."""
    piece = source_code(PAIRS["tiny"][0], shortest=1)
    requests = [
        Request(f"f{i}", piece(random.Random(where)), SamplingParams(**asked), arrival)
        for i, (asked, where, arrival) in enumerate(clients)
    ]
    with recorded_gaps() as gaps, engine("tiny", max_num_seqs=6) as llm:
        plain = run(llm, requests)
    with engine("tiny", tree, async_scheduling=asynchronous, **LIMITS) as llm:
        found = run(llm, requests)
    assert found.metrics["vllm:spec_decode_num_drafts"] > 0
    differences = (
        (r, difference(r, plain.outputs[r.name], found.outputs[r.name], gaps)) for r in requests
    )
    return [f"{r.params}: {d.what}" for r, d in differences if d and not d.near_tie]


def _fuzz(examples: int) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        # Shrinking would start hundreds of engines.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(tree=trees(), clients=CLIENTS, asynchronous=st.booleans())
    def equal(tree: dict[str, int], clients: list, asynchronous: bool) -> None:
        assert not _differences(tree, clients, asynchronous)

    equal()


def test_random_requests_and_trees() -> None:
    _fuzz(2)


@pytest.mark.full
def test_many_random_requests_and_trees() -> None:
    _fuzz(40)
