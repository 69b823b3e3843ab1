"""The replay: its tree against the published code's, and its counts on drafts of known quality."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_griffin.train.checkpoint import load_draft
from vllm_griffin.train.data import HiddenStates
from vllm_griffin.train.setup import load_target_parts
from vllm_griffin.train.simulate import Replay, _grow, _prefix, replay

GOLDEN = Path(__file__).parent / "data" / "golden"


def stored(
    tmp_path: Path, tokens: torch.Tensor, features: torch.Tensor, prompt: int
) -> HiddenStates:
    """One document as stored data, features unrounded."""
    shard = {
        "tokens": tokens.int(),
        "hidden": features.half(),
        "starts": torch.tensor([0, len(tokens)]),
        "prompt_len": torch.tensor([prompt]),
        "ids": torch.tensor([0]),
    }
    save_file(shard, tmp_path / "shard-00000.safetensors")
    data = HiddenStates(tmp_path)
    data.hidden = [features]
    return data


def paths(tokens: list[int], parents: list[int]) -> set[tuple[int, ...]]:
    """Root-to-node token paths of a tree, the root itself left out."""
    found: list[tuple[int, ...]] = [()]
    for node in range(1, len(tokens)):
        found.append((*found[parents[node]], tokens[node]))
    return set(found[1:])


@pytest.mark.parametrize(("case", "prompts"), [("a", 3), ("b", 2)])
@torch.inference_mode()
def test_tree_is_the_published_one(tmp_path: Path, case: str, prompts: int) -> None:
    draft = load_draft(GOLDEN / case / "draft")
    head = load_target_parts(GOLDEN / case / "target").head
    expected = load_file(GOLDEN / case / "expected.safetensors")
    for j in range(prompts):
        ids, features = expected[f"{j}.input_ids"], expected[f"{j}.features"]
        tokens = torch.cat([ids, expected[f"{j}.root"]])
        # The root's own feature is unknown when its tree is drafted; any value must do.
        data = stored(tmp_path, tokens, torch.cat([features, features[-1:] * 0 + 7]), len(ids))
        prefix = _prefix(draft, data, [0])
        levels = _grow(draft, head, prefix, torch.tensor([0]), [len(ids)], 6, 10)
        cut = torch.cat([level.scores[0] for level in levels]).topk(59).values[-1]
        got: set[tuple[int, ...]] = set()
        frontier: list[tuple[int, ...]] = [()]
        for level in levels:
            nodes = [
                (*frontier[i // 10], token) for i, token in enumerate(level.tokens[0].tolist())
            ]
            got |= {n for n, s in zip(nodes, level.scores[0], strict=True) if s >= cut}
            frontier = [nodes[i] for i in level.frontier[0].tolist()]
        wanted = paths(
            expected[f"{j}.tree_tokens"].tolist(), expected[f"{j}.tree_parents"].tolist()
        )
        assert got == wanted


def test_counts() -> None:
    result = Replay()
    result.add(2, 3)
    result.add(0, 3)
    assert (result.steps, result.accepted, result.accepted_at) == (2, 2, [1, 1, 0])
    assert result.acceptance_length == 2.0


def test_chain_accepts_what_the_draft_itself_wrote(tmp_path: Path) -> None:
    """Where the document is the draft's own greedy chain, a chain and a tree accept all of it."""
    folder = GOLDEN / "a"
    draft, head = load_draft(folder / "draft"), load_target_parts(folder / "target").head
    expected = load_file(folder / "expected.safetensors")
    tokens = torch.cat([expected["1.input_ids"], expected["1.root"]])
    features = torch.cat([expected["1.features"], torch.zeros(1, 64)])
    data = stored(tmp_path, tokens, features, 33)
    with torch.inference_mode():
        levels = _grow(draft, head, _prefix(draft, data, [0]), torch.tensor([0]), [33], 4, 1)
    chain = torch.cat([level.tokens[0] for level in levels])
    data = stored(
        tmp_path, torch.cat([tokens, chain]), torch.cat([features, torch.zeros(4, 64)]), 33
    )
    for nodes, top_k in [(4, 1), (52, 4)]:  # 52 is all that such a tree can hold
        result = replay(draft, head, data, nodes=nodes, depth=4, top_k=top_k)
        assert (result.steps, result.accepted) == (1, 4)
    data.tokens[0][35] = (data.tokens[0][35] + 1) % 512  # the second drafted token is now wrong
    result = replay(draft, head, data, nodes=4, depth=4, top_k=1)
    assert result.accepted_at[:2] == [1, 0] or result.accepted_at[1] < result.steps
