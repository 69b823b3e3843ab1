"""Chains, and trees cut to one node, are verified by the engine's own causal attention."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.engine.harness import Outcome, Request, engine, random_prompt, run
from tests.engine.oracle import oracle_trees
from tests.engine.ties import assert_lossless, recorded_gaps
from vllm_griffin.attention.metadata import TreeRows
from vllm_griffin.runner.model_state import GriffinModelState

VOCABULARY = 512
# In several chunks, so that chains stand beside prompts.
SMALL_STEPS = {"max_num_batched_tokens": 64}


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(11)
    greedy = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, detokenize=False)
    seeded = greedy.clone()
    seeded.temperature, seeded.seed = 1.0, 5
    return [
        Request(f"c-{n}", random_prompt(generator, n, VOCABULARY), params, arrival=i)
        for i, (n, params) in enumerate(((3, greedy), (90, seeded), (140, greedy), (33, seeded)))
    ]


@pytest.fixture(scope="module")
def plain() -> tuple[Outcome, dict[tuple[str, int], float]]:
    with recorded_gaps() as gaps, engine("golden-b", **SMALL_STEPS) as llm:
        return run(llm, requests()), dict(gaps)


@pytest.mark.parametrize(
    ("spec", "causal"),
    [
        ({"num_speculative_tokens": 4, "tree_depth": 4, "tree_top_k": 1}, True),
        # Of ten children one is verified.
        ({"num_speculative_tokens": 1, "tree_depth": 3, "tree_top_k": 10}, True),
        ({"num_speculative_tokens": 4, "tree_depth": 2, "tree_top_k": 2}, False),
    ],
    ids=["chain", "one node", "tree"],
)
def test_lossless(
    spec: dict[str, Any],
    causal: bool,
    plain: tuple[Outcome, dict[tuple[str, int], float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, gaps = plain
    # [(nodes of the largest tree, whether its rows have masks of their own)] by step
    verified: list[tuple[int, bool]] = []
    rows_of = GriffinModelState._tree_rows

    def watched(self: GriffinModelState, batch: Any, full_graph: bool) -> Any:
        rows, alone = rows_of(self, batch, full_graph)
        if batch.num_draft_tokens:
            verified.append((int(batch.num_draft_tokens_per_req.max()), rows is not None))
        return rows, alone

    monkeypatch.setattr(GriffinModelState, "_tree_rows", watched)
    texts = {r.name: r.prompt + expected.tokens[r.name] for r in requests()}
    with engine("golden-b", spec, **SMALL_STEPS) as llm, oracle_trees(texts, VOCABULARY):
        outcome = run(llm, requests())
    assert_lossless(requests(), expected, gaps, outcome)
    assert outcome.acceptance_length > 1.3
    assert {masked for nodes, masked in verified if nodes > 1} <= {not causal}
    assert not any(masked for nodes, masked in verified if nodes == 1)
    assert max(nodes for nodes, _ in verified) == spec["num_speculative_tokens"]


@pytest.mark.parametrize("chains", [True, False])
@pytest.mark.parametrize("nodes", [0, 1, 4])
def test_a_full_graph_and_its_replays_have_the_same_rows(chains: bool, nodes: int) -> None:
    """A CPU captures no causal rows, as it plans their attention on the host: here by the two decisions."""
    state = GriffinModelState.__new__(GriffinModelState)
    bits = torch.ones(2, 5, 1, dtype=torch.int64)
    state.rows = TreeRows.empty(2, bits)
    state.trees = SimpleNamespace(bits=bits)
    state._sizes, state._chains = [1, 4], chains
    rows = 1 + nodes
    batch: Any = SimpleNamespace(
        num_reqs=2,
        num_reqs_after_padding=2,
        num_scheduled_tokens=np.full(2, rows),
        num_draft_tokens=2 * nodes,
        num_draft_tokens_per_req=np.full(2, nodes),
        idx_mapping=torch.arange(2),
        query_start_loc=torch.arange(3) * rows,
        cu_num_logits=torch.arange(3) * rows,
        seq_lens=torch.full((2,), 9 + rows),
    )
    captured = state._rows_to_capture(batch)
    replayed, alone = state._tree_rows(batch, True)
    assert (captured is None) == (replayed is None) == (chains or nodes < 2)
    assert alone == (replayed is not None)
    if captured is not None and replayed is not None:
        assert captured.bits.data_ptr() == replayed.bits.data_ptr()
        assert captured.bits.shape == replayed.bits.shape == (2, rows, 1)
