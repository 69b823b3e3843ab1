"""Bitmasks along a tree against a grammar that replays each path by itself."""

import json
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import Request
from vllm.v1.structured_output import ConstraintBounds, StructuredOutputManager
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from tests.engine.harness import MODELS
from vllm_griffin.grammar import (
    TOKEN_BITS,
    GrammarTree,
    attach_trees,
    carry_parents,
    fill_bitmask,
    split_parents,
)
from vllm_griffin.tree import DraftTrees

NODES = 40
# The end of the reasoning, in the tests that have some.
END = 7
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "args": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["name", "args"],
}
CONSTRAINTS = {
    "json": {"json": json.dumps(SCHEMA)},
    "regex": {"regex": r"(def|class) [a-z_]{1,8}(\(self\))?:"},
    "choice": {"choice": ["return", "return None", "raise", "self"]},
    "grammar": {"grammar": 'root ::= call ("." call)*\ncall ::= [a-z]+ "(" [0-9]? ")"'},
}


@pytest.fixture(scope="module")
def config() -> object:
    return EngineArgs(
        model=str(MODELS / "target"),
        dtype="float32",
        max_num_seqs=4,
        max_model_len=256,
        speculative_config={
            "method": "griffin",
            "model": str(MODELS / "griffin"),
            "num_speculative_tokens": NODES,
        },
    ).create_engine_config()


@pytest.fixture
def manager(config: object) -> StructuredOutputManager:
    manager = StructuredOutputManager(config)
    manager._use_async_grammar_compilation = False
    return manager


def _request(manager: StructuredOutputManager, backend: str, name: str) -> Request:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**CONSTRAINTS[name]))
    if backend == "xgrammar":
        validate_xgrammar_grammar(params)  # where a choice becomes a grammar
    params.structured_outputs._backend = backend
    params.update_from_generation_config({}, manager.tokenizer.eos_token_id)
    request = Request(f"{backend}-{name}", [5, 6], params, None)
    manager.grammar_init(request)
    return request


def _fresh_grammar(manager: StructuredOutputManager, request: Request, read: list[int]) -> object:
    grammar = manager._create_grammar(request)
    for token in read:
        assert grammar.accept_tokens("", [token])
    return grammar


def _expected(
    manager: StructuredOutputManager, request: Request, read: list[int], path: list[int]
) -> torch.Tensor | None:
    """What may follow ``path``, all bits if the grammar has ended; None: nobody can get there."""
    grammar = _fresh_grammar(manager, request, read)
    mask = manager.backend.allocate_token_bitmask(1)
    for token in path:
        if grammar.is_terminated():
            break
        grammar.fill_bitmask(mask, 0)
        if token not in _allowed(mask[0]):
            return None
        assert grammar.accept_tokens("", [token])
    if grammar.is_terminated():
        mask.fill_(-1)
    else:
        grammar.fill_bitmask(mask, 0)
    return mask[0]


def _allowed(mask: torch.Tensor) -> list[int]:
    bits = (mask.unsqueeze(1) >> torch.arange(32, dtype=torch.int32)) & 1
    return bits.flatten().nonzero().flatten().tolist()


# What a grammar allows after a path, as a bitmask; None after a path that it bars.
MayFollow = Callable[[list[int]], torch.Tensor | None]
EVERY = range(2048)


class RandomTree:
    """Nodes in an order that has parents before children; most, but not all, follow the grammar."""

    def __init__(self, seed: int, may_follow: MayFollow, others: Sequence[int]) -> None:
        """Every third node's token is one of ``others``."""
        choose = random.Random(seed)
        self.paths: list[list[int]] = [[]]
        self.parents: list[int] = []
        while len(self.parents) < NODES:
            parent = choose.randrange(len(self.paths))
            mask = may_follow(self.paths[parent])
            follows = len(self.parents) % 3 > 0
            if len(self.paths[parent]) < 6 and (mask is not None or not follows):
                token = choose.choice(_allowed(mask) if follows else others)
                self.parents.append(parent)
                self.paths.append([*self.paths[parent], token])

    @property
    def drafts(self) -> list[int]:
        return [
            parent << TOKEN_BITS | path[-1]
            for parent, path in zip(self.parents, self.paths[1:], strict=True)
        ]


def _check_rows(rows: torch.Tensor, tree: RandomTree, may_follow: MayFollow) -> int:
    """Rows against what replaying each path gives; returns how many can be reached."""
    reached = 0
    for row, path in zip(rows, tree.paths, strict=False):
        expected = may_follow(path)
        if expected is None:
            parent = rows[tree.paths.index(path[:-1])]
            above = may_follow(path[:-1])
            assert above is None or path[-1] not in _allowed(parent), "a way out of the grammar"
        else:
            assert torch.equal(row, expected), path
            reached += 1
    return reached


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("backend", ["xgrammar", "guidance", "outlines"])
def test_rows_allow_what_may_follow_their_path(
    manager: StructuredOutputManager, backend: str, name: str
) -> None:
    if (backend, name) == ("outlines", "grammar"):
        pytest.skip("vLLM refuses grammars for outlines")
    request = _request(manager, backend, name)
    grammar = request.structured_output_request.grammar
    read: list[int] = []
    choose = random.Random(name)
    ends = 0
    for step in range(6):

        def may_follow(path: list[int], read: list[int] = read) -> torch.Tensor | None:
            return _expected(manager, request, list(read), path)

        tree = RandomTree(step, may_follow, EVERY)
        kept = NODES - 7 * (step % 3)  # the scheduler may cut the list anywhere
        bitmask = fill_bitmask(
            manager, {"r": request}, ["r"], {"r": [*tree.drafts[:kept], *[-1] * (NODES - kept)]}
        )
        assert bitmask.shape[0] == 1 + NODES
        rows = torch.from_numpy(bitmask)
        assert _check_rows(rows[: 1 + kept], tree, may_follow) > kept // 2
        assert (rows[1 + kept :] == -1).all()
        ends += sum(bool((row == -1).all()) for row in rows[: 1 + kept])
        # Nothing of it stays behind: the text goes on.
        token = choose.choice(
            [t for t in _allowed(rows[0]) if t != manager.tokenizer.eos_token_id] or [-1]
        )
        if token < 0:
            break
        assert grammar.accept_tokens("", [token])
        read.append(token)
    assert ends or name == "json"


def test_requests_fill_their_own_rows(manager: StructuredOutputManager) -> None:
    requests = {name: _request(manager, "xgrammar", name) for name in ("regex", "choice", "json")}
    follows = {
        name: lambda path, r=request: _expected(manager, r, [], path)
        for name, request in requests.items()
    }
    trees = {name: RandomTree(3, follows[name], EVERY) for name in ("regex", "json")}
    scheduled = {"regex": trees["regex"].drafts[:9], "json": trees["json"].drafts}
    rows = torch.from_numpy(fill_bitmask(manager, requests, list(requests), scheduled))
    assert len(rows) == 10 + 1 + 1 + NODES
    _check_rows(rows[:10], trees["regex"], follows["regex"])
    assert torch.equal(rows[10], follows["choice"]([]))
    _check_rows(rows[11:], trees["json"], follows["json"])


class Reasoner:
    """Ends the reasoning at a token."""

    end = END

    def __init__(self, tokenizer: object) -> None:
        pass

    def is_reasoning_end(self, input_ids: list[int]) -> bool:
        return self.end in input_ids

    def is_reasoning_end_streaming(self, input_ids: list[int], delta_ids: list[int]) -> bool:
        return self.end in delta_ids


@pytest.mark.parametrize("implicit", [False, True])
def test_a_grammar_may_begin_on_any_path(manager: StructuredOutputManager, implicit: bool) -> None:
    """A reasoning that ends at END, or implicitly at a token which is the grammar's first."""
    manager.reasoner_cls = Reasoner
    request = _request(manager, "xgrammar", "regex")
    first = manager.tokenizer.encode("def", add_special_tokens=False)[0]
    marker = first if implicit else END
    free = torch.full((2048 // 32,), -1, dtype=torch.int32)

    def may_follow(path: list[int]) -> torch.Tensor | None:
        if marker not in path:
            return free
        start = path.index(marker) + (not implicit)
        return _expected(manager, request, [], path[start:])

    def implicit_bounds(request: Request, spec_tokens: list[int]) -> ConstraintBounds:
        at = spec_tokens.index(marker) if marker in spec_tokens else len(spec_tokens) + 1
        return ConstraintBounds(at, at + (marker in spec_tokens))

    tree = RandomTree(5, may_follow, [marker])
    rows = torch.full((1 + NODES, len(free)), -1, dtype=torch.int32)
    if implicit:
        manager._get_constraint_bounds = implicit_bounds
    GrammarTree(manager, request, tree.drafts).fill(rows)
    assert _check_rows(rows, tree, may_follow) > NODES // 2
    begins = {tuple(p) for p in tree.paths if marker in p[-1:] and marker not in p[:-1]}
    assert len(begins) > 2 and (rows[0] == -1).all()


def test_parents_ride_on_the_copied_tokens() -> None:
    trees = DraftTrees(3, 5, torch.device("cpu"))
    trees.parents[2] = torch.tensor([-1, 0, 1, 0, 3, 3])
    tokens = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 2**31 - 1, 6, 0]])
    batch = SimpleNamespace(idx_mapping=torch.tensor([0, 2]), has_structured_output_reqs=True)
    assert carry_parents(batch, tokens) is tokens, "another method's batch"
    attach_trees(batch, trees)
    chain, tree = carry_parents(batch, tokens).tolist()
    assert split_parents(chain) == ([1, 2, 3, 4, 5], [0, 1, 2, 3, 4])
    assert split_parents(tree[:4]) == ([9, 8, 2**31 - 1, 6], [0, 1, 0, 3])
    batch.has_structured_output_reqs = False
    assert carry_parents(batch, tokens) is tokens, "nobody reads them"
