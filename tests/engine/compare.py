"""Two outputs of one request: equal, different at a shown near-tie, or different."""

import math
from dataclasses import dataclass
from typing import Any

from tests.engine.harness import NEAR_TIE, Request

TOLERANCE = 1e-4
# (request name, position) -> how close the plain engine's decision was there
Gaps = dict[tuple[str, int], float]
# token -> its log-probability, as vLLM gives them for one position
Scores = dict[int, Any]


@dataclass(frozen=True)
class Difference:
    """What differs first, and whether the plain engine was at a near-tie there."""

    what: str
    near_tie: bool = False


def difference(request: Request, expected: Any, found: Any, gaps: Gaps) -> Difference | None:
    """Compares two finished ``RequestOutput``; None if they are equal."""
    if len(expected.outputs) != len(found.outputs):
        return Difference(f"{len(expected.outputs)} completions, {len(found.outputs)} found")
    for wanted in expected.outputs:
        index = wanted.index
        other = next(c for c in found.outputs if c.index == index)
        name = request.name if len(expected.outputs) == 1 else f"{index}_{request.name}"
        differs = _completion(name, len(request.prompt), wanted, other, gaps)
        if differs:
            return differs
    if what := _all_scores(expected.prompt_logprobs, found.prompt_logprobs):
        return Difference(f"prompt log-probs: {what}")
    a, b = expected.prompt_token_id_logprobs, found.prompt_token_id_logprobs
    if (a is None) != (b is None) or (a is not None and abs(a - b).max() > TOLERANCE):
        return Difference("log-probs of given prompt tokens")
    return None


def _completion(name: str, prompt: int, wanted: Any, other: Any, gaps: Gaps) -> Difference | None:
    a, b = list(wanted.token_ids), list(other.token_ids)
    if a != b:
        pairs = zip(a, b, strict=False)
        at = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
        gap = gaps.get((name, prompt + at - 1), math.inf)
        return Difference(f"token {at}, gap {gap:.1e}: {a} != {b}", near_tie=gap < NEAR_TIE)
    for what in ("text", "finish_reason", "stop_reason"):
        if getattr(wanted, what) != getattr(other, what):
            return Difference(f"{what}: {getattr(wanted, what)!r} != {getattr(other, what)!r}")
    if what := _all_scores(wanted.logprobs, other.logprobs):
        return Difference(f"log-probs: {what}")
    return None


def _all_scores(expected: Any, found: Any) -> str | None:
    """What differs between two lists of scores; None if all are within tolerance."""
    if (expected is None) != (found is None):
        return "present in one only"
    if expected is None:
        return None
    if len(expected) != len(found):
        return f"{len(expected)} positions, {len(found)} found"
    for at in range(len(expected)):
        if what := _scores(expected[at], found[at]):
            return f"position {at}: {what}"
    return None


def _scores(expected: Scores | None, found: Scores | None) -> str | None:
    if not expected or not found:
        return None if not expected and not found else "present in one only"
    # The first entry is the token itself; of the others, those at the cut may be equally good.
    token, other = next(iter(expected)), next(iter(found))
    if token != other:
        return f"token {token} != {other}"
    if abs(expected[token].rank - found[token].rank) > _equals(expected, token):
        return f"rank {expected[token].rank} != {found[token].rank}"
    a, b = ([s.logprob for s in _ranked(scores, token)] for scores in (expected, found))
    if len(a) != len(b) or not all(_close(x, y) for x, y in zip(a, b, strict=True)):
        return f"{a} != {b}"
    return None


def _ranked(scores: Scores, token: int) -> list[Any]:
    """The token's own score, then all from the best to the worst."""
    return [scores[token], *sorted(scores.values(), key=lambda s: -s.logprob)]


def _equals(scores: Scores, token: int) -> int:
    """How many of the given tokens are too close to this one to rank."""
    value = scores[token].logprob
    return sum(_close(s.logprob, value) for t, s in scores.items() if t != token)


def _close(x: float, y: float) -> bool:
    return x == y or abs(x - y) <= TOLERANCE
