"""Verify steps: what the engine's trace and the replay both say, in one form.

A draft tree is given by rows: row 0 is the root, a token that the target has chosen; ``tokens[r]`` and
``parents[r]`` belong to row r, parents come first, and rows 1, 2, ... begin with the spine, the draft's own
best chain (see `vllm_griffin.kernels.tree_order`).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_griffin.evaluate.outputs import Output
from vllm_griffin.trace import TraceRecord


@dataclass(frozen=True)
class Step:
    """One verify step.

    Attributes:
        position: The root's position in the text.
        accepted: Drafted tokens accepted, as the engine counts them: also past the answer's end.
        drafted: Nodes verified, the root not counted.
        spine_right: Leading spine tokens that equal the answer.
        spine_wrong: The spine goes on after those, and differs from the answer there.
        rest: Tokens of the answer after the root.
    """

    position: int
    accepted: int
    drafted: int
    spine_right: int
    spine_wrong: bool
    rest: int


@dataclass
class PromptSteps:
    """The verify steps of one answer, in order; `trees` [(tokens, parents)] of each step if kept."""

    set: str
    id: int
    temperature: float
    steps: list[Step]
    trees: list[tuple[list[int], list[int]]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, float]:
        """As `Output.key`."""
        return self.set, self.id, self.temperature


def walk(tokens: Sequence[int], parents: Sequence[int], known: Sequence[int]) -> int:
    """How many tokens of `known` the tree holds as a path from its root."""
    children = defaultdict(dict)  # type: dict[int, dict[int, int]]
    for row in range(1, len(tokens)):
        children[parents[row]][tokens[row]] = row
    here = 0
    for count, token in enumerate(known):
        if token not in children[here]:
            return count
        here = children[here][token]
    return len(known)


def spine(tokens: Sequence[int], parents: Sequence[int], answer: Sequence[int]) -> tuple[int, bool]:
    """(leading spine tokens that equal `answer`, whether the spine goes on and differs there)."""
    for row in range(1, len(tokens)):
        if parents[row] != row - 1 or row > len(answer):
            return row - 1, False
        if tokens[row] != answer[row - 1]:
            return row - 1, True
    return len(tokens) - 1, False


def steps_of_trace(
    records: Iterable[TraceRecord], requests: dict[str, Output]
) -> list[PromptSteps]:
    """The steps that an engine traced.

    Args:
        records: The trace.
        requests: Request id -> what the engine answered.

    Raises:
        ValueError: The trace contradicts an answer.
    """
    found = {name: PromptSteps(o.set, o.id, o.temperature, [], []) for name, o in requests.items()}
    for record in records:
        output = requests[record.request_id]
        answer = output.text[record.position + 1 :]
        told = [record.tokens[row] for row in record.accepted[1:]] + [record.bonus]
        if told[: len(answer)] != answer[: len(told)] or not answer:
            raise ValueError(
                f"the trace of request {record.request_id} at position {record.position} is not "
                f"what the engine answered"
            )
        right, wrong = spine(record.tokens, record.parents, answer)
        prompt = found[record.request_id]
        prompt.steps.append(
            Step(
                position=record.position,
                accepted=len(record.accepted) - 1,
                drafted=record.num_drafted,
                spine_right=right,
                spine_wrong=wrong,
                rest=len(answer),
            )
        )
        prompt.trees.append((record.tokens, record.parents))
    return list(found.values())


@dataclass
class Comparison:
    """Two runs of the same prompts: answers and verify steps compared, and how many differ."""

    prompts: int = 0
    steps: int = 0
    differing_steps: int = 0
    differing_trees: int = 0


def compare(engine: Sequence[PromptSteps], replay: Sequence[PromptSteps]) -> Comparison:
    """Compare step for step: all fields of `Step`, and the trees as sets of root-to-node paths.

    A step that only one of the two has is a difference. Trees are compared where both kept them.
    """
    others = {prompt.key: prompt for prompt in replay}
    result = Comparison(prompts=len(engine))
    for prompt in engine:
        other = others[prompt.key]
        result.steps += max(len(prompt.steps), len(other.steps))
        pairs = list(zip(prompt.steps, other.steps, strict=False))
        result.differing_steps += sum(a != b for a, b in pairs)
        result.differing_steps += abs(len(prompt.steps) - len(other.steps))
        result.differing_trees += sum(
            paths(*a) != paths(*b) for a, b in zip(prompt.trees, other.trees, strict=False)
        )
    return result


def paths(tokens: Sequence[int], parents: Sequence[int]) -> set[tuple[int, ...]]:
    """A tree as the set of token paths from its root to each row, the root's own token left out."""
    found: list[tuple[int, ...]] = [()]
    for row in range(1, len(tokens)):
        found.append((*found[parents[row]], tokens[row]))
    return set(found)
