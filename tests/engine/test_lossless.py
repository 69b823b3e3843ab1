"""Losslessness: griffin's outputs equal the plain engine's, over all pairs of settings."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from vllm import SamplingParams

from tests.engine.harness import (
    Outcome,
    Request,
    engine,
    random_prompt,
    run,
)
from tests.engine.oracle import oracle_trees
from tests.engine.ties import assert_lossless, recorded_gaps
from vllm_griffin.tree_shape import max_tree_nodes

VALUES = {
    "num_nodes": (1, 7, 12, 59),
    "depth": (1, 3, 6),
    "top_k": (1, 4, 10),
    "prefix_caching": (False, True),
    "async_scheduling": (False, True),
    "small_cache": (False, True),
    "processes": (False, True),
    "kernels": ("auto", "triton"),
}


class Setting(NamedTuple):
    """One engine configuration; ``small_cache`` forces preemption."""

    num_nodes: int
    depth: int
    top_k: int
    prefix_caching: bool
    async_scheduling: bool
    small_cache: bool
    processes: bool
    kernels: str


# 13 configurations that hold every valid pair of values (a test below counts them).
SETTINGS = [
    ("tiny", Setting(1, 6, 1, False, True, False, False, "auto")),
    ("tiny", Setting(12, 3, 10, True, False, True, True, "auto")),
    ("golden-a", Setting(7, 1, 10, True, False, False, False, "triton")),
    ("tiny", Setting(7, 3, 4, False, True, True, True, "triton")),
    ("tiny", Setting(59, 6, 4, True, False, False, True, "auto")),
    ("tiny", Setting(1, 1, 1, False, False, True, True, "triton")),
    ("golden-b", Setting(59, 3, 10, False, True, True, False, "auto")),
    ("golden-b", Setting(12, 6, 4, False, True, False, False, "triton")),
    ("golden-a", Setting(1, 1, 10, True, True, False, False, "auto")),
    ("golden-a", Setting(7, 6, 10, False, True, True, False, "auto")),
    ("golden-b", Setting(1, 3, 1, True, False, False, False, "auto")),
    ("golden-a", Setting(1, 1, 4, False, True, True, False, "auto")),
    ("tiny", Setting(59, 6, 10, True, True, True, False, "auto")),
]
VOCABULARY = {"golden-a": 512, "golden-b": 512, "tiny": 2048}
# Small enough that long prompts take several chunks and full batches have their trees trimmed.
MAX_BATCHED_TOKENS = 128
INTERPRETED_TOKENS = 6
PROMPT_LENGTHS = (1, 2, 3, 150, 31, 32, 33, 160, 64, 127, 128, 200, 129, 5, 40, 90)


def _valid(setting: Setting) -> bool:
    fits = setting.num_nodes <= max_tree_nodes(setting.depth, setting.top_k)
    return fits and (setting.kernels == "auto" or setting.num_nodes <= 12)


def _pairs(setting: Setting) -> set[tuple[object, ...]]:
    return set(itertools.combinations(zip(Setting._fields, setting, strict=True), 2))


def test_settings_cover_all_valid_pairs() -> None:
    every = [s for s in map(Setting._make, itertools.product(*VALUES.values())) if _valid(s)]
    needed = set().union(*map(_pairs, every))
    covered = set().union(*(_pairs(s) for _, s in SETTINGS))
    assert needed == covered
    assert len(SETTINGS) + len(VOCABULARY) <= 16


def _requests(pair: str) -> list[Request]:
    """Greedy and seeded requests by turns; two share a long prefix with an earlier one."""
    generator = torch.Generator().manual_seed(17)
    requests: list[Request] = []
    for i, length in enumerate(PROMPT_LENGTHS):
        prompt = random_prompt(generator, length, VOCABULARY[pair])
        if length in (160, 200):
            prompt[:140] = requests[3].prompt[:140]
        params = SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False, temperature=0)
        if i % 2:
            params.temperature, params.seed = 1.0, 1000 + i
            params.top_p, params.top_k = (1.0, 0.9, 0.7)[i % 3], (0, 5, 50)[i // 2 % 3]
        requests.append(Request(f"{pair}-{i}", prompt, params, arrival=i // 3))
    return requests


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[list[Request], Outcome, dict[tuple[str, int], float]]]:
    """What the engine without speculation gives, and how close its decisions were."""
    found = {}
    for pair in VOCABULARY:
        requests = _requests(pair)
        with (
            recorded_gaps() as gaps,
            engine(pair, max_num_batched_tokens=MAX_BATCHED_TOKENS) as llm,
        ):
            found[pair] = (requests, run(llm, requests), dict(gaps))
    return found


def _cut(requests: list[Request], expected: Outcome) -> tuple[list[Request], Outcome]:
    """The same with fewer tokens each: an interpreted step takes seconds."""
    shorter = []
    for request in requests:
        params = request.params.clone()
        params.max_tokens = INTERPRETED_TOKENS
        shorter.append(replace(request, params=params))
    tokens = {name: found[:INTERPRETED_TOKENS] for name, found in expected.tokens.items()}
    return shorter, replace(expected, tokens=tokens)


@pytest.mark.parametrize(
    ("pair", "setting"), SETTINGS, ids=["-".join(map(str, (p, *s))) for p, s in SETTINGS]
)
def test_lossless(pair: str, setting: Setting, plain: dict) -> None:
    requests, expected, gaps = plain[pair]
    if setting.kernels == "triton":
        requests, expected = _cut(requests[:4], expected)
    spec = {
        "num_speculative_tokens": setting.num_nodes,
        "tree_depth": setting.depth,
        "tree_top_k": setting.top_k,
    }
    texts = {r.name: r.prompt + expected.tokens[r.name] for r in requests}
    cache = {"num_gpu_blocks_override": 24, "block_size": 32} if setting.small_cache else {}
    with (
        engine(
            pair,
            spec,
            async_scheduling=setting.async_scheduling,
            processes=setting.processes,
            kernels=setting.kernels,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            enable_prefix_caching=setting.prefix_caching,
            **cache,
        ) as llm,
        # The golden drafts are random; another process drafts for itself.
        oracle_trees(texts, VOCABULARY[pair]),
    ):
        outcome = run(llm, requests)
    excused = assert_lossless(requests, expected, gaps, outcome)
    print(
        f"{pair} {tuple(setting)}: {len(requests)} requests, {excused} excused, "
        f"acceptance length {outcome.acceptance_length:.2f}, "
        f"preemptions {outcome.metrics['vllm:num_preemptions']}"
    )
    if not setting.processes:
        assert outcome.acceptance_length > 1.2
    if setting.small_cache and setting.kernels == "auto":
        assert outcome.metrics["vllm:num_preemptions"] > 0
