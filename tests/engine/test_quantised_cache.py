"""A KV cache of 8-bit floats: the same outputs as without speculation on such a cache."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.attention import Attention

from tests.engine.harness import Outcome, Request, engine, random_prompt, run
from tests.engine.oracle import oracle_trees
from tests.engine.ties import assert_lossless, recorded_gaps

# As a checkpoint may bring them: one for a key head, of which vLLM's CPU attention takes the largest.
K_SCALE, V_SCALE = 0.25, 0.04
VOCABULARY = 512
SPEC = {"num_speculative_tokens": 12, "tree_depth": 4, "tree_top_k": 4}
QUANTISED = {"kv_cache_dtype": "fp8", "max_num_batched_tokens": 64}
TOKENS = {"auto": 24, "torch": 6, "triton": 6}


def scaled(llm: LLM) -> LLM:
    """Gives every layer its scales, as the loading of a quantised checkpoint does."""
    worker: Any = llm.llm_engine.model_executor.driver_worker.worker
    layers = worker.model_runner.compilation_config.static_forward_context.values()
    for layer in layers:
        assert isinstance(layer, Attention)
        layer._k_scale = torch.linspace(K_SCALE, K_SCALE / 2, layer.num_kv_heads)
        layer._v_scale = torch.linspace(V_SCALE, V_SCALE / 2, layer.num_kv_heads)
        layer._k_scale_float, layer._v_scale_float = K_SCALE, V_SCALE
    return llm


def requests_of(vocabulary: int) -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    greedy = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, detokenize=False)
    seeded = greedy.clone()
    seeded.temperature, seeded.seed = 1.0, 5
    return [
        Request(f"q-{n}", random_prompt(generator, n, vocabulary), params)
        for n, params in ((3, greedy), (40, seeded), (90, greedy), (33, seeded))
    ]


@pytest.fixture(scope="module")
def plain() -> tuple[Outcome, dict[tuple[str, int], float]]:
    requests = requests_of(VOCABULARY)
    with recorded_gaps() as gaps, engine("golden-b", **QUANTISED) as llm:
        expected, gaps = run(scaled(llm), requests), dict(gaps)
    with engine("golden-b") as llm:
        exact = run(llm, requests)
    assert exact.tokens != expected.tokens, "a cache that rounds nothing proves nothing"
    return expected, gaps


@pytest.mark.parametrize("kernels", TOKENS)
def test_lossless(kernels: str, plain: tuple[Outcome, dict[tuple[str, int], float]]) -> None:
    expected, gaps = plain
    most = TOKENS[kernels]
    requests = requests_of(VOCABULARY)
    for request in requests:
        request.params.max_tokens = most
    expected = replace(expected, tokens={k: t[:most] for k, t in expected.tokens.items()})
    texts = {r.name: r.prompt + expected.tokens[r.name] for r in requests}
    with (
        engine("golden-b", SPEC, kernels=kernels, **QUANTISED) as llm,
        oracle_trees(texts, VOCABULARY),
    ):
        outcome = run(scaled(llm), requests)
    assert_lossless(requests, expected, gaps, outcome)
    assert outcome.acceptance_length > 1.5


def test_the_draft_reads_its_cache() -> None:
    """A trained draft loses little by it; one whose keys and values had another size would lose all."""
    requests = requests_of(2048)
    with engine("tiny", SPEC) as llm:
        exact = run(llm, requests)
    with engine("tiny", SPEC, **QUANTISED) as llm:
        rounded = run(scaled(llm), requests)
    print(exact.acceptance_length, rounded.acceptance_length)
    assert rounded.acceptance_length > 0.85 * exact.acceptance_length
