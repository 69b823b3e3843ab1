"""Trees that the engine chooses by timed steps: `num_speculative_tokens_per_batch_size="auto"`."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.engine.harness import PAIRS, Outcome, Request, engine, random_prompt, run
from tests.engine.oracle import oracle_trees
from tests.engine.ties import assert_lossless, recorded_gaps
from vllm_griffin.cost import choose, describe
from vllm_griffin.evaluate.trees import pooled_lengths, write_trees
from vllm_griffin.model.checkpoint import DraftCheckpoint
from vllm_griffin.trace import read_trace
from vllm_griffin.tree_sizes import REST, TRIAL, Choice

AUTO = {"num_speculative_tokens_per_batch_size": "auto"}


class Steps:
    """A machine whose steps take a fixed time, and a time for each row."""

    def __init__(self, row: float) -> None:
        self.row = row
        self.asked: list[tuple[int, int]] = []

    def seconds(self, batch: int, nodes: int) -> float:
        self.asked.append((batch, nodes))
        draft = 0.1 if nodes else 0.0
        return 1 + draft + self.row * batch * (1 + nodes)


LENGTHS = {3: 1.6, 15: 2.2, 59: 2.7}


def test_the_tree_that_pays_most() -> None:
    steps = Steps(row=0.02)
    choices = choose(steps, LENGTHS, 64)
    # b = 1: 1.02 / 1.18, 1.42, 2.3 times the lengths: 1.38, 1.58, 1.20.
    assert choices[0] == Choice(1, 15, pytest.approx(2.2 * 1.02 / 1.42))
    # b = 2: 1.04 / 1.26, 1.74, 3.5: 1.32, 1.31, 0.80; b = 4: 1.08 / 1.42, 2.38, 5.9: 1.22, 1.00, 0.49;
    # b = 8: 1.16 / 1.74 * 1.6 = 1.07.
    assert [(c.batch, c.nodes) for c in choices] == [(1, 15), (2, 3), (4, 3), (8, 0)]
    assert not [batch for batch, _ in steps.asked if batch > 8], "one that has none is the last"
    text = describe(choices, {3: "3,1,3", 15: "15,4,4"})
    assert ": up to 1: tree 15,4,4 (1.58x), up to 2: tree 3,1,3 (" in text
    assert text.endswith(", more: no drafting")


@pytest.mark.parametrize(("length", "nodes"), [(1.66, 3), (1.70, 15)])
def test_a_larger_tree_must_promise_more_than_times_scatter(length: float, nodes: int) -> None:
    (choice,) = choose(Steps(row=0.0), {3: 1.6, 15: length}, 1)
    assert choice.nodes == nodes


def test_where_no_tree_pays_there_is_none() -> None:
    steps = Steps(row=1.5)
    choices = choose(steps, LENGTHS, 7)
    assert choices == [Choice(1, 0, 1.0)]
    assert describe(choices, {}) == "No tree pays here: drafting is off"
    # After three nodes took so long, larger trees need not be timed.
    assert steps.asked == [(1, 0), (1, 3)]


def test_a_machine_that_slows_down_does_not_turn_trees_off() -> None:
    class Slowing(Steps):
        def seconds(self, batch: int, nodes: int) -> float:
            return super().seconds(batch, nodes) * 1.1 ** len(self.asked)

    (choice,) = choose(Slowing(row=0.0), {3: 1.25}, 1)
    assert choice == Choice(1, 3, pytest.approx(1.25 / 1.1, rel=0.01))


def test_one_slow_step_does_not_turn_trees_off() -> None:
    class Stumbling(Steps):
        def seconds(self, batch: int, nodes: int) -> float:
            seconds = super().seconds(batch, nodes)
            # The second time that the tree is timed, between the second and the third plain steps.
            return 3 * seconds if len(self.asked) == 4 else seconds

    (choice,) = choose(Stumbling(row=0.0), {3: 1.25}, 1)
    assert choice == Choice(1, 3, pytest.approx(1.25 / 1.1))


def test_all_batch_sizes_have_a_tree_where_rows_are_free() -> None:
    choices = choose(Steps(row=0.0), LENGTHS, 6)
    assert [(c.batch, c.nodes) for c in choices] == [(1, 59), (2, 59), (4, 59), (6, 59)]
    assert describe(choices, {59: "59,6,10"}).endswith(", up to 6: tree 59,6,10 (2.45x)")


def test_steps_that_cannot_hold_a_batch_are_no_choice() -> None:
    class Full(Steps):
        def seconds(self, batch: int, nodes: int) -> float:
            held = batch * (1 + nodes) <= 64 and batch <= 8
            return super().seconds(batch, nodes) if held else math.inf

    choices = choose(Full(row=0.0), LENGTHS, 32)
    assert [(c.batch, c.nodes) for c in choices] == [(1, 59), (2, 15), (4, 15), (8, 3)]


def test_what_cannot_be_timed_at_all_has_no_tree() -> None:
    class Tiny(Steps):
        def seconds(self, batch: int, nodes: int) -> float:
            return math.inf

    choices = choose(Tiny(row=0.0), LENGTHS, 8)
    assert describe(choices, {}) == "No tree pays here: drafting is off"


def _requests() -> list[Request]:
    generator = torch.Generator().manual_seed(4)
    requests = []
    for i in range(5):
        sampling: dict[str, Any] = {"temperature": 0}
        if i % 2:
            sampling = {"temperature": 1.0, "seed": i}
        params = SamplingParams(**sampling, max_tokens=30, ignore_eos=True, detokenize=False)
        requests.append(Request(f"r{i}", random_prompt(generator, 6 + 5 * i, 512), params, 3 * i))
    return requests


@pytest.fixture(scope="module")
def plain() -> tuple[Outcome, dict]:
    with recorded_gaps() as gaps, engine("golden-a", max_num_seqs=4) as llm:
        return run(llm, _requests()), gaps


def _sizes(llm: Any) -> dict[int, int]:
    """Nodes by the batch sizes that start-up timed."""
    lookup = llm.llm_engine.engine_core.engine_core.scheduler.dynamic_sd_lookup
    return {size.batch: size.nodes for size in lookup.sizes}


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        # Eight trees of 16 rows do not fit into a step, so no time of theirs is one.
        ({"max_num_batched_tokens": 64}, {1: 15, 2: 15, 4: 15, 8: 0}),
        # Nor do four requests, two blocks each, into five; the sixth is vLLM's own.
        ({"num_gpu_blocks_override": 6, "block_size": 32, "max_model_len": 128}, {1: 15, 2: 15}),
    ],
)
def test_what_a_step_cannot_hold_is_not_chosen(limits: dict, sizes: dict[int, int]) -> None:
    spec = AUTO | {"tree_acceptance": {"15,4,4": 5.0}}
    with (
        mocked_times({0: 1.0, 15: 1.0}),
        engine("golden-a", spec, max_num_seqs=16, **limits) as llm,
    ):
        assert _sizes(llm) == sizes


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_tree_that_pays_is_drafted_in_its_own_shape(
    plain: tuple, tmp_path: Path, async_scheduling: bool
) -> None:
    """No tree of six levels can be worth drafting by itself here, so its acceptance is said to be huge."""
    trace = tmp_path / "trace.jsonl"
    requests = _requests()
    texts = {r.name: r.prompt + plain[0].tokens[r.name] for r in requests}
    spec = AUTO | {"tree_acceptance": {"3,1,3": 2.0, "30,6,5": 7.0}}
    options = {"async_scheduling": async_scheduling, "max_num_seqs": 4}
    with (
        mocked_times({0: 1.0, 3: 1.0, 30: 1.0}),
        engine("golden-a", spec, trace=trace, **options) as llm,
        oracle_trees(texts, 512),
    ):
        assert _sizes(llm) == {1: 30, 2: 30, 4: 30}
        griffin = run(llm, requests)
    assert_lossless(requests, *plain, griffin)
    records = read_trace(trace)
    assert {r.request_id for r in records} <= {r.name for r in requests}
    assert max(len(r.tokens) for r in records) == 31
    assert max(max(r.depths) for r in records) == 6


def test_sizes_have_levels_of_their_own(plain: tuple, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    requests = _requests()
    spec = AUTO | {"tree_acceptance": {"3,1,3": 2.0, "30,6,5": 7.0}}
    with (
        mocked_times({0: 1.0, 3: 1.0, 30: 100.0}),
        engine("golden-a", spec, trace=trace, max_num_seqs=4) as llm,
    ):
        assert _sizes(llm) == {1: 3, 2: 3, 4: 3}
        # Whatever is chosen, vLLM captures graphs for the sizes that it was told of.
        assert llm.llm_engine.vllm_config.speculative_config.tree_sizes == [3, 30]
        griffin = run(llm, requests)
    assert_lossless(requests, *plain, griffin)
    assert {tuple(r.depths) for r in read_trace(trace) if len(r.tokens) == 4} == {(0, 1, 1, 1)}


def test_true_times_turn_a_hopeless_draft_off(plain: tuple, tmp_path: Path) -> None:
    """Nothing is mocked: a tree that is never accepted cannot pay, and then nothing is drafted at all."""
    trace = tmp_path / "trace.jsonl"
    requests = _requests()
    spec = AUTO | {"tree_acceptance": {"3,1,3": 1.0}}
    with engine("golden-a", spec, trace=trace, max_num_seqs=4) as llm:
        assert _sizes(llm) == {1: 0}
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        speculator = worker.worker.model_runner.speculator
        assert not speculator.drafting
        speculator.model = None
        griffin = run(llm, requests)
    assert_lossless(requests, *plain, griffin)
    assert not trace.exists() or not read_trace(trace)
    assert griffin.metrics["vllm:spec_decode_num_drafts"] == 0


def test_a_promise_that_real_steps_do_not_keep(plain: tuple, tmp_path: Path) -> None:
    """Nothing is accepted, so trees rest after their trial; the tokens are the same all the way."""
    trace = tmp_path / "trace.jsonl"
    requests = [r for r in _requests() if r.name in ("r0", "r1")]
    spec = AUTO | {"tree_acceptance": {"3,1,3": 1.5, "12,4,4": 5.0}}
    with (
        mocked_times({0: 1.0, 3: 1.5, 12: 1.5}),
        engine("golden-a", spec, trace=trace, max_num_seqs=1) as llm,
    ):
        (size,) = llm.llm_engine.engine_core.engine_core.scheduler.dynamic_sd_lookup.sizes
        griffin = run(llm, requests)
        assert size.rest == 2 * REST
        assert 0 < size.plain_left < REST
    assert_lossless(requests, *plain, griffin)
    # Two prompts' first trees are no uniform steps.
    assert TRIAL <= len(read_trace(trace)) <= TRIAL + 4


def test_true_times_are_taken_with_several_processes(plain: tuple) -> None:
    """Four levels of drafting cost more than a fifth of so small a target's step, whatever the machine."""
    requests = _requests()
    spec = AUTO | {"tree_acceptance": {"12,4,4": 1.2}}
    with engine("golden-a", spec, max_num_seqs=4, processes=True) as llm:
        griffin = run(llm, requests)
    assert_lossless(requests, *plain, griffin)
    assert griffin.metrics["vllm:spec_decode_num_drafts"] == 0


class mocked_times:
    """Steps of n nodes take times[n], whatever the batch; they are still run."""

    def __init__(self, times: dict[int, float]) -> None:
        self.patch = pytest.MonkeyPatch()
        self.times = times

    def __enter__(self) -> None:
        from vllm_griffin.cost import StepTimer

        timed = StepTimer.seconds

        def seconds(timer: StepTimer, batch: int, nodes: int) -> float:
            seconds = timed(timer, batch, nodes)
            assert seconds > 0
            return self.times[nodes] if seconds < math.inf else math.inf

        self.patch.setattr(StepTimer, "seconds", seconds)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def test_eval_keeps_pooled_lengths_in_the_config(tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(PAIRS["tiny"][1], draft)
    row = {"draft": str(draft), "tree": "3,1,3", "accepted": 10, "steps": 20}
    rows = [row, row | {"accepted": 50, "steps": 40}, row | {"draft": "other", "steps": 1}]
    lengths = pooled_lengths(str(draft), rows)
    assert lengths == {"3,1,3": 2.0}
    before = json.loads((draft / "config.json").read_text())
    write_trees(draft, lengths)
    assert DraftCheckpoint.open(draft).tree_acceptance() == lengths
    after = json.loads((draft / "config.json").read_text())
    assert after.pop("tree_acceptance") == lengths
    assert after == before
