"""What verify steps amount to, with bootstrap errors over prompts.

Every ratio is pooled: sums over all steps of a prompt set are divided, no ratios are averaged. The bootstrap
resamples prompts, since the steps of one answer depend on each other (percentile method).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_griffin.evaluate.steps import PromptSteps, Step

RESAMPLES = 2000
SEED = 0


def summarise(records: Sequence[PromptSteps], depth: int) -> dict[str, Any]:
    """Metrics of one draft, prompt set, temperature and tree.

    Args:
        records: Verify steps per prompt, from an engine or from a replay.
        depth: Levels of the tree.

    Returns:
        prompts, steps, accepted, drafted: counts;
        acceptance_length: 1 + accepted / steps, and its 95 % interval `acceptance_length_95`;
        per_depth: share of steps that accepted at least 1, 2, .. `depth` tokens;
        misaligned: for forwards n = 2 .. `depth`, of all roots the share where one of the first n - 1 spine
            tokens is wrong (GRIFFIN, arXiv 2502.11018, fig. 1c). Roots with fewer than n - 1 answer tokens
            after them are left out, and so are those whose spine is right as far as it goes but shorter:
            `misaligned_roots` says how many count;
        drafted_per_accepted: nodes verified per accepted token;
        per_prompt: [accepted, steps] of each prompt, in order.
        Ratios over nothing are None.
    """
    steps = [step for prompt in records for step in prompt.steps]
    accepted = sum(step.accepted for step in steps)
    drafted = sum(step.drafted for step in steps)
    counts = [_misaligned(steps, n) for n in range(2, depth + 1)]
    low, high = _interval(_lengths(_per_prompt(records), _resamples(len(records))))
    return {
        "prompts": len(records),
        "steps": len(steps),
        "accepted": accepted,
        "drafted": drafted,
        "acceptance_length": _ratio(accepted, len(steps), offset=1.0),
        "acceptance_length_95": [low, high],
        "per_depth": [
            _ratio(sum(step.accepted >= d for step in steps), len(steps))
            for d in range(1, depth + 1)
        ],
        "misaligned": [_ratio(wrong, roots) for wrong, roots in counts],
        "misaligned_roots": [roots for _, roots in counts],
        "drafted_per_accepted": _ratio(drafted, accepted),
        "per_prompt": _per_prompt(records).astype(int).tolist(),
    }


def compare_lengths(first: Sequence[PromptSteps], other: Sequence[PromptSteps]) -> dict[str, Any]:
    """Acceptance length of `other` against `first` on the same prompts: difference and ratio, 95 % intervals.

    The bootstrap is paired: both are taken on the same resampled prompts.

    Raises:
        ValueError: The two are not of the same prompts.
    """
    by_key = {(p.set, p.id, p.temperature): p for p in other}
    if len(first) != len(other) or any(p.key not in by_key for p in first):
        raise ValueError("a paired comparison needs the same prompts on both sides")
    counts = _per_prompt(first), _per_prompt([by_key[p.key] for p in first])
    everyone = np.arange(len(first))[None]
    draws = _resamples(len(first))
    here, there = (_lengths(c, everyone)[0] for c in counts)
    drawn_here, drawn_there = (_lengths(c, draws) for c in counts)
    return {
        "difference": _number(there - here),
        "difference_95": list(_interval(drawn_there - drawn_here)),
        "ratio": _number(there / here),
        "ratio_95": list(_interval(drawn_there / drawn_here)),
    }


def _misaligned(steps: Sequence[Step], forward: int) -> tuple[int, int]:
    """(misaligned roots, roots that count) of one forward; see `summarise`."""
    wrong = right = 0
    for step in steps:
        if step.rest < forward - 1:
            continue
        if step.spine_right >= forward - 1:
            right += 1
        elif step.spine_wrong:
            wrong += 1
    return wrong, wrong + right


def _per_prompt(records: Sequence[PromptSteps]) -> np.ndarray:
    """[prompts, 2]: accepted tokens and steps."""
    rows = [(sum(s.accepted for s in p.steps), len(p.steps)) for p in records]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def _resamples(prompts: int) -> np.ndarray:
    """[RESAMPLES, prompts] prompt numbers, drawn with replacement."""
    return np.random.default_rng(SEED).integers(0, max(prompts, 1), (RESAMPLES, prompts))


def _lengths(counts: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Pooled acceptance lengths [n] of prompt selections [n, prompts]; NaN without a step."""
    sums = counts[draws].sum(axis=1)
    with np.errstate(invalid="ignore"):
        return 1 + sums[:, 0] / sums[:, 1]


def _interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """2.5th and 97.5th percentile; None where no value is a number."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None, None
    low, high = np.percentile(values, [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)


def _ratio(above: float, below: float, offset: float = 0.0) -> float | None:
    return round(offset + above / below, 4) if below else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
