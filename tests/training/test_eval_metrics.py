"""Metrics of verify steps against hand counts, and the bootstrap's behaviour."""

import pytest

from vllm_griffin.evaluate.metrics import compare_lengths, summarise
from vllm_griffin.evaluate.outputs import Output
from vllm_griffin.evaluate.steps import (
    PromptSteps,
    Step,
    compare,
    paths,
    spine,
    steps_of_trace,
    walk,
)
from vllm_griffin.trace import TraceRecord

# Root 5; spine 7, 9; further nodes 8 and 6 at the root and 4 below 7.
TOKENS, PARENTS = [5, 7, 9, 8, 6, 4], [-1, 0, 1, 0, 0, 1]


def prompt(accepted: list[int], id: int = 0, **fields) -> PromptSteps:
    steps = [Step(10 + i, a, 6, a, True, 9) for i, a in enumerate(accepted)]
    return PromptSteps("s", id, 0.0, steps, **fields)


@pytest.mark.parametrize(
    ("known", "accepted"),
    [([7, 9, 1], 2), ([7, 4], 2), ([7, 8], 1), ([8, 9], 1), ([9], 0), ([], 0), ([7], 1)],
)
def test_walk_follows_the_text(known, accepted):
    assert walk(TOKENS, PARENTS, known) == accepted


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([7, 9, 1], (2, False)),  # right to its end, and shorter than the answer
        ([7, 4, 1], (1, True)),
        ([8, 9], (0, True)),
        ([7], (1, False)),  # the answer ends first
        ([], (0, False)),
    ],
)
def test_spine_against_the_answer(answer, expected):
    assert spine(TOKENS, PARENTS, answer) == expected


def test_paths():
    assert paths(TOKENS, PARENTS) == {(), (7,), (7, 9), (8,), (6,), (7, 4)}


def test_pooled_length_and_depths():
    # 2 + 0 + 1 accepted in 3 steps, and 3 in 1: pooled, not averaged over prompts.
    result = summarise([prompt([2, 0, 1]), prompt([3], id=1)], depth=3)
    assert (result["prompts"], result["steps"], result["accepted"]) == (2, 4, 6)
    assert result["acceptance_length"] == 2.5
    assert result["per_depth"] == [0.75, 0.5, 0.25]
    assert result["drafted_per_accepted"] == 4.0
    # Resampled prompts: lengths 2, 2.5 and 4 are all there can be.
    assert result["acceptance_length_95"] == [2.0, 4.0]


def test_misaligned_roots_are_those_with_a_wrong_token_before_the_forward():
    steps = [
        Step(10, 0, 6, 0, True, 5),  # wrong at once: misaligned at forwards 2, 3, 4
        Step(11, 1, 6, 1, True, 5),  # its second token is wrong: at 3, 4
        Step(12, 3, 6, 3, False, 3),  # right
        Step(13, 2, 6, 2, False, 5),  # right, but shorter than three: left out at 4
        Step(14, 0, 6, 0, True, 1),  # one answer token follows: counts at 2 only
        Step(15, 0, 6, 0, False, 0),  # none follows: nowhere
    ]
    result = summarise([PromptSteps("s", 0, 0.0, steps)], depth=4)
    assert result["misaligned"] == [2 / 5, 2 / 4, round(2 / 3, 4)]
    assert result["misaligned_roots"] == [5, 4, 3]


def test_nothing_to_count():
    result = summarise([PromptSteps("s", 0, 0.0, [])], depth=2)
    assert result["acceptance_length"] is None
    assert result["acceptance_length_95"] == [None, None]
    assert result["per_depth"] == [None, None]
    assert result["misaligned"] == [None]


def test_paired_comparison_is_exact_where_drafts_differ_by_the_same_amount():
    first = [prompt([i % 4, 1], id=i) for i in range(12)]
    other = [prompt([i % 4 + 1, 2], id=i) for i in reversed(range(12))]
    result = compare_lengths(first, other)
    assert result["difference"] == 1.0
    assert result["difference_95"] == [1.0, 1.0]
    assert result["ratio"] > 1.3
    low, high = result["ratio_95"]
    assert low < result["ratio"] < high
    assert compare_lengths(first, other) == result  # a fixed seed
    assert compare_lengths(other, first)["difference"] == -1.0


def test_paired_comparison_needs_the_same_prompts():
    with pytest.raises(ValueError, match="same prompts"):
        compare_lengths([prompt([1], id=0)], [prompt([1], id=1)])


def record(**changes) -> TraceRecord:
    fields = {
        "request_id": "0",
        "step": 0,
        "position": 2,
        "tokens": TOKENS,
        "parents": PARENTS,
        "depths": [0, 1, 2, 1, 1, 2],
        "scores": [0.0, -0.1, -0.2, -2.0, -3.0, -4.0],
        "accepted": [0, 1, 5],
        "bonus": 3,
    }
    return TraceRecord(**(fields | changes))


def test_steps_of_a_trace():
    output = Output(7, 1.0, [1, 2], [5, 7, 4, 3, 8], set="s")
    (found,) = steps_of_trace([record()], {"0": output})
    assert found.key == ("s", 7, 1.0)
    assert found.steps == [Step(2, 2, 5, 1, True, 4)]
    # The step runs past the answer's end and counts there too; the spine is judged by the answer alone.
    output = Output(7, 1.0, [1, 2], [5, 7], set="s")
    (found,) = steps_of_trace([record()], {"0": output})
    assert found.steps == [Step(2, 2, 5, 1, False, 1)]


def test_a_trace_that_contradicts_the_answer():
    with pytest.raises(ValueError, match="request 0 at position 2"):
        steps_of_trace([record()], {"0": Output(7, 1.0, [1, 2], [5, 7, 9, 3], set="s")})


def test_comparison_counts_every_difference():
    tree = (TOKENS, PARENTS)
    other = (TOKENS[:-1], PARENTS[:-1])
    ours = [prompt([1, 2, 0], trees=[tree] * 3)]
    assert compare(ours, [prompt([1, 2, 0], trees=[tree] * 3)]).differing_steps == 0
    result = compare(ours, [prompt([1, 1], trees=[tree, other])])
    # One step differs, one is missing.
    assert (result.steps, result.differing_steps, result.differing_trees) == (3, 2, 1)
