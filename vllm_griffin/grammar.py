"""Structured output on a tree: each node's bitmask allows what may follow the path to that node.

The scheduler's process fills the bitmasks, and it knows drafts as a flat list. So the shape travels
with them: whenever vLLM copies drafts to the scheduler, each one carries its parent's row in its upper
32 bits. What vLLM does to the list on the way (keep a prefix, pad with -1) leaves it a tree.
"""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.v1.request import Request
from vllm.v1.structured_output import ConstraintBounds, StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.utils import strip_speculative_padding
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_griffin.tree import DraftTrees

TOKEN_BITS = 32


def attach_trees(batch: InputBatch, trees: DraftTrees) -> None:
    """Lets ``carry_parents`` find the trees: the batch is all that vLLM hands on to it."""
    batch.__dict__["draft_trees"] = trees


def carry_parents(batch: InputBatch, draft_tokens: torch.Tensor) -> torch.Tensor:
    """Draft tokens [B, N] int64 with their parents' rows in the upper bits; stays on the device.

    A batch of another method than griffin is left as it is.
    """
    trees: DraftTrees | None = batch.__dict__.get("draft_trees")
    if trees is None or not batch.has_structured_output_reqs:
        return draft_tokens
    parents = trees.parents[batch.idx_mapping, 1 : 1 + draft_tokens.shape[1]]
    return (parents.long() << TOKEN_BITS) | draft_tokens


def split_parents(drafts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Tokens and parents' rows of one request's drafts; the first draft is row 1."""
    return [d & ((1 << TOKEN_BITS) - 1) for d in drafts], [d >> TOKEN_BITS for d in drafts]


def fill_bitmask(
    manager: StructuredOutputManager,
    requests: dict[str, Request],
    request_ids: list[str],
    scheduled: dict[str, list[int]],
) -> np.ndarray:
    """The bitmask of a step, [rows, words] int32, in which a set bit allows a token.

    Each request of ``request_ids`` has a row for its root and one per scheduled draft. Rows behind the
    end of a grammar allow everything, as without speculation; so do rows that cannot be reached, and
    those of placeholders, which the worker refuses.
    """
    if manager._grammar_bitmask is None:
        assert manager.backend is not None
        config = manager.vllm_config
        most_rows = config.scheduler_config.max_num_seqs * (1 + config.num_speculative_tokens)
        manager._grammar_bitmask = manager.backend.allocate_token_bitmask(most_rows)
    first = 0
    for request_id in request_ids:
        drafts = scheduled.get(request_id, [])
        rows = manager._grammar_bitmask[first : first + 1 + len(drafts)]
        rows.fill_(-1)
        tree = GrammarTree(manager, requests[request_id], strip_speculative_padding(drafts))
        tree.fill(rows)
        first += len(rows)
    return manager._grammar_bitmask[:first].numpy()


class GrammarTree:
    """One request's drafts and the grammar that they have to follow.

    The walk uses what every backend of vLLM has. xgrammar's own ``traverse_draft_tree`` fills the same
    rows in two thirds of the time, but knows no reasoning that comes before the grammar, and leaves
    nothing allowed behind the end, where an engine without speculation allows everything.
    """

    def __init__(
        self, manager: StructuredOutputManager, request: Request, drafts: Sequence[int]
    ) -> None:
        structured = request.structured_output_request
        assert structured is not None
        grammar = structured.grammar
        assert isinstance(grammar, StructuredOutputGrammar), "scheduled with its grammar compiled"
        self.manager = manager
        self.request = request
        self.grammar = grammar
        self.tokens, parents = split_parents(drafts)
        self.children: list[list[int]] = [[] for _ in range(1 + len(drafts))]
        for row, parent in enumerate(parents, start=1):
            self.children[parent].append(row)
        # A reasoning parser tells on each path anew where the grammar begins.
        self.root_bounds = manager._get_constraint_bounds(request, [])

    def fill(self, rows: torch.Tensor) -> None:
        """Fills ``rows`` [1 + N, words]; the grammar's state is afterwards what it was."""
        self.rows, self.words = rows, rows.numpy()
        self._visit(0, [], self.root_bounds.constraint_start)

    def _visit(self, row: int, path: list[int], constraint_start: int) -> None:
        """Fills the row of a node and those below it; the grammar has read ``path``."""
        grammar = self.grammar
        constrained = constraint_start <= len(path) and not grammar.is_terminated()
        if constrained:
            grammar.fill_bitmask(self.rows, row)
        for child in self.children[row]:
            token = self.tokens[child - 1]
            longer = [*path, token]
            bounds = self._bounds(longer)
            feeds = bounds.grammar_start <= len(path)
            if feeds and not (
                self._allows(row, token, constrained)
                and grammar.accept_tokens(self.request.request_id, [token])
            ):
                continue
            self._visit(child, longer, bounds.constraint_start)
            if feeds:
                grammar.rollback(1)

    def _allows(self, row: int, token: int, constrained: bool) -> bool:
        if constrained:
            return bool(self.words[row, token // 32] >> (token % 32) & 1)
        # The token that ends the reasoning may be the grammar's first; behind its end none is.
        return bool(self.grammar.validate_tokens([token]))

    def _bounds(self, path: list[int]) -> ConstraintBounds:
        if self.root_bounds.constraint_start == 0:
            return self.root_bounds
        return self.manager._get_constraint_bounds(self.request, path)
