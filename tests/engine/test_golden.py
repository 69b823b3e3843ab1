"""The engine's first tree against the published code's, for every golden prompt."""

import json
from pathlib import Path

import pytest
from vllm import SamplingParams

from tests.engine.harness import (
    GOLDEN,
    NEAR_TIE,
    Request,
    engine,
    golden_prompts,
    run,
    tree_paths,
)
from vllm_griffin.trace import read_trace


@pytest.mark.parametrize("case", ["a", "b"])
def test_first_tree_equals_the_published_codes(case: str, tmp_path: Path) -> None:
    shape = json.loads((GOLDEN / case / "case.json").read_text())["tree"]
    spec = {
        "num_speculative_tokens": shape["total_tokens"] - 1,
        "tree_depth": shape["depth"] + 1,
        "tree_top_k": shape["top_k"],
    }
    prompts = golden_prompts(case)
    greedy = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    trace = tmp_path / "trace.jsonl"
    with engine(f"golden-{case}", spec, trace=trace) as llm:
        requests = [Request(str(j), p["input_ids"].tolist(), greedy) for j, p in enumerate(prompts)]
        run(llm, requests)
    first = {r.request_id: r for r in read_trace(trace) if r.step == 0}
    excused = 0
    for j, expected in enumerate(prompts):
        record = first[str(j)]
        assert record.tokens[0] == expected["root"].item()
        assert record.position == len(expected["input_ids"])
        ours = tree_paths(record.tokens, record.parents)
        theirs = tree_paths(expected["tree_tokens"].tolist(), expected["tree_parents"].tolist())
        # A path that only one tree has must tie with the worst node that was kept.
        worst = min(record.scores)
        score = dict(zip(_paths_in_order(record), record.scores, strict=True))
        for path in ours - theirs:
            assert score[path] - worst < NEAR_TIE, (j, path)
            excused += 1
        assert len(ours) == len(theirs)
    print(f"golden {case}: {len(prompts)} trees, {excused} near-tie nodes excused")
    assert excused <= 2


def _paths_in_order(record: object) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(record.tokens[1:], record.parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths
