"""Replay: stored outputs through the draft and its tree alone, step for step what the engine does.

Seeded lossless output does not depend on the draft, so a verify step accepts exactly the longest path of its
tree that the stored tokens continue, at any temperature. Of a tree, only that is grown which can decide
the step:

1. The stored tokens are followed while each is among its parent's `top_k` best (`follow`).
2. Often their scores alone say that they are in the tree (`Path.is_certain`).
3. Else the tree is grown as the engine grows it, except that nodes are not expanded whose children cannot
   matter (`grow`).

The same is asked of the spine's first token that differs from the answer. With `whole`, every tree is grown
to its end instead.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from vllm_griffin.evaluate.drafting import DraftHead, ReplayedDocument, best_children
from vllm_griffin.evaluate.follow import Path, follow
from vllm_griffin.evaluate.grow import Question, grow
from vllm_griffin.evaluate.outputs import Output
from vllm_griffin.evaluate.steps import PromptSteps, Step, spine, walk
from vllm_griffin.train.network import Draft
from vllm_griffin.train.setup import TargetParts
from vllm_griffin.tree_shape import TreeShape


class Outputs(Protocol):
    """Stored outputs with hidden states: `vllm_griffin.evaluate.states.OutputStates`."""

    outputs: list[Output]

    def features(self, number: int) -> Tensor:
        """Hidden states [tokens - 1, h], float32, of output `number`."""


@torch.inference_mode()
def replay_outputs(
    draft: Draft,
    parts: TargetParts,
    outputs: Outputs,
    tree: TreeShape,
    *,
    context: int | None = None,
    batch: int = 32,
    vocabulary: list[int] | None = None,
    whole: bool = False,
    done: Callable[[], None] = lambda: None,
) -> list[PromptSteps]:
    """Verify steps of stored outputs, as the engine would take them with this draft and tree.

    Args:
        draft: The network, with the target's embedding.
        parts: The target's.
        outputs: Answers with tails and hidden states.
        tree: The draft tree.
        context: The longest text that the engine allows, near which trees are trimmed; the target's
            `max_position_embeddings` by default.
        batch: Documents at one time.
        vocabulary: Ids of the tokens to draft from, ascending; None: all.
        whole: Grow whole trees and keep them in the result: slower, same steps.
        done: Called after each output.

    Returns:
        One record per output, in order.
    """
    limit = context or int(parts.config["max_position_embeddings"])
    replayer = _Replay(draft, DraftHead.of(parts.head, vocabulary), tree, limit, whole)
    records: list[PromptSteps] = []
    live: list[ReplayedDocument] = []
    for document in _documents(draft, outputs):
        records.append(document.record)
        live.append(document)
        # The batch is kept full: a document that ends makes room for the next.
        while len(live) >= batch:
            live = replayer.step(live, done)
    while live:
        live = replayer.step(live, done)
    return records


def _documents(draft: Draft, outputs: Outputs) -> Iterator[ReplayedDocument]:
    for number, output in enumerate(outputs.outputs):
        yield ReplayedDocument(draft, output, outputs.features(number))


class _Replay:
    """The verify steps of one draft and tree."""

    def __init__(
        self, draft: Draft, head: DraftHead, shape: TreeShape, context: int, whole: bool
    ) -> None:
        self.draft = draft
        self.head = head
        self.shape = shape
        self.context = context
        self.whole = whole

    def step(
        self, documents: list[ReplayedDocument], done: Callable[[], None]
    ) -> list[ReplayedDocument]:
        """One verify step of each document; returns those that go on."""
        live = [document for document in documents if document.is_live]
        if live:
            self._step(live)
        going = [document for document in live if document.is_live]
        for _ in range(len(documents) - len(going)):
            done()
        return going

    def _step(self, live: list[ReplayedDocument]) -> None:
        paths, roots = self._look(live)
        # The scheduler keeps room for the root and the token after the path.
        sizes = [min(self.shape.nodes, self.context - document.root - 2) for document in live]
        found: list[tuple[int, int, bool] | None] = []
        asked: dict[int, list[Question] | None] = {}
        for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
            found.append(None)
            if size < 1:
                # No room for a tree: the engine decodes one token, which is no verify step.
                found[i] = (0, 0, False)
            elif self.whole or size < self.shape.nodes:
                asked[i] = None
            elif path.is_certain(self.shape):
                found[i] = (len(path.scores), path.best, path.rival is not None)
            else:
                asked[i] = path.questions
        for i, (tokens, parents) in zip(asked, self._grow(live, roots, asked), strict=True):
            document = live[i]
            tree = [document.tokens[document.root], *tokens[: sizes[i]]], parents[: 1 + sizes[i]]
            found[i] = walk(*tree, document.known), *spine(*tree, document.answer)
            if self.whole:
                document.record.trees.append(tree)
        for document, size, result in zip(live, sizes, found, strict=True):
            assert result is not None
            _count(document, size, *result)

    def _look(self, live: list[ReplayedDocument]) -> tuple[list[Path], tuple[Tensor, Tensor]]:
        """Paths of stored tokens (for whole trees none are needed), and the roots' best children."""
        if not self.whole:
            return follow(self.draft, self.head, self.shape, self.context, live)
        predict = torch.stack([document.outputs()[0] for document in live])
        return [Path() for _ in live], best_children(predict, self.head, self.shape.top_k)

    def _grow(
        self,
        live: list[ReplayedDocument],
        roots: tuple[Tensor, Tensor],
        asked: dict[int, list[Question] | None],
    ) -> list[tuple[list[int], list[int]]]:
        if not asked:
            return []
        rows = list(asked)
        return grow(
            self.draft,
            self.head,
            self.shape,
            self.context,
            [live[i] for i in rows],
            (roots[0][rows], roots[1][rows]),
            list(asked.values()),
        )


def _count(document: ReplayedDocument, size: int, accepted: int, right: int, wrong: bool) -> None:
    """Record a step with a tree of `size` nodes, and move on to the next root."""
    if size >= 1:
        step = Step(document.root, accepted, size, right, wrong, len(document.answer))
        document.record.steps.append(step)
    document.root += accepted + 1
