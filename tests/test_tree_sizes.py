"""The choice of a step's tree by what real steps gave."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_griffin import tree_sizes
from vllm_griffin.tree_sizes import (
    FEWEST_TIMES,
    FIRST_PROBE,
    HOLES,
    LONGEST_REST,
    PROBE,
    PROBE_EVERY,
    REST,
    TRIAL,
    WINDOW,
    BatchSize,
    Choice,
    TreeSizes,
)


def _serve(size: BatchSize, steps: int, tokens: float, ratio: float) -> list[int]:
    """Steps that take 1 s, or `ratio` with a tree. Returns what each drafted."""
    drafted = []
    for _ in range(steps):
        nodes = size.next_nodes()
        drafted.append(nodes)
        size.observe(nodes, tokens if nodes else 1.0, ratio if nodes else 1.0)
    return drafted


def test_a_promise_kept_goes_on_with_probes() -> None:
    drafted = _serve(BatchSize(Choice(4, 5, 1.5), 2.0), 2000, tokens=2.0, ratio=1.4)
    plain = [step for step, nodes in enumerate(drafted) if nodes == 0]
    assert plain[:PROBE] == list(range(FIRST_PROBE, FIRST_PROBE + PROBE))
    second = FIRST_PROBE + PROBE_EVERY + PROBE
    assert plain[PROBE : 2 * PROBE] == list(range(second, second + PROBE))
    assert len(plain) == 4 * PROBE


def test_few_tokens_end_a_trial_by_the_promised_times() -> None:
    size = BatchSize(Choice(1, 5, 1.5), 2.0)
    drafted = _serve(size, TRIAL + REST + TRIAL + 2 * REST + 1, tokens=1.3, ratio=4 / 3)
    assert drafted == [5] * TRIAL + [0] * REST + [5] * TRIAL + [0] * 2 * REST + [5]


def test_slow_steps_show_at_the_first_probe() -> None:
    """Tokens come as promised, but a step takes twice a plain one; only plain steps can show that."""
    size = BatchSize(Choice(1, 5, 1.5), 1.8)
    drafted = _serve(size, FIRST_PROBE + PROBE + 2 + REST, tokens=1.8, ratio=2.0)
    assert drafted[:FIRST_PROBE] == [5] * FIRST_PROBE
    assert drafted[FIRST_PROBE : FIRST_PROBE + PROBE] == [0] * PROBE
    assert sum(map(bool, drafted[FIRST_PROBE + PROBE :])) == 2


def test_a_few_unlucky_steps_end_no_trial() -> None:
    """Tokens come in bursts: 1.9 on average, of which the first 16 steps give 1.38."""
    size = BatchSize(Choice(1, 5, 1.3), 2.0)
    unlucky, usual = [1, 1, 2, 1, 1, 1, 3, 1] * 2, [1, 2, 2, 3] * 12
    for tokens in [*unlucky, *usual]:
        nodes = size.next_nodes()
        size.observe(nodes, tokens if nodes else 1.0, 1.4 if nodes else 1.0)
        assert size.plain_left <= PROBE
    assert size.rest == REST


def test_plain_steps_that_lie_back_are_taken_anew() -> None:
    """Contexts grow until a step takes twice as long: with and without a tree, which stays worth it."""
    size = BatchSize(Choice(1, 5, 1.4), 2.0)
    drafted = _serve(size, FIRST_PROBE + PROBE + WINDOW, tokens=2.0, ratio=1.4)
    later = []
    for _ in range(100):
        nodes = size.next_nodes()
        later.append(nodes)
        size.observe(nodes, 2.0 if nodes else 1.0, 2.8 if nodes else 2.0)
    assert drafted.count(0) == PROBE
    assert later.count(0) == PROBE, "one probe, no rest"


def test_a_step_in_flight_does_not_cut_a_probe_short() -> None:
    """Async scheduling: the step after a verdict was scheduled before it."""
    size = BatchSize(Choice(1, 5, 1.3), 2.0)
    size.seconds[0].extend([1.0] * FEWEST_TIMES)
    size.since_plain = PROBE_EVERY
    in_flight = size.next_nodes()
    drafted = [in_flight]
    for _ in range(60):
        scheduled = size.next_nodes()
        # A tree takes twice as long as plain steps did, who take 1.6 s themselves by now.
        size.observe(in_flight, 1.5 if in_flight else 1.0, 2.0 if in_flight else 1.6)
        in_flight = scheduled
        drafted.append(scheduled)
    assert drafted.count(0) == 2 * PROBE, "the first regular probe, and the one to judge by"
    assert size.rest == REST


def test_probes_alone_end_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = _Scheduler(monkeypatch, [Choice(1, 5, 1.5)])
    drafted = []
    for _ in range(5000):
        drafted.append(scheduler.step("a", tokens=2, seconds=1.2 if scheduler.last else 1.0))
        scheduler.num_tokens += 2 if scheduler.last else 1
    assert 0 < drafted.count(0) == 10 * PROBE
    assert scheduler.sizes.holes["a"] > HOLES


def test_rests_have_an_end_and_success_forgets_them() -> None:
    size = BatchSize(Choice(1, 5, 1.5), 2.0)
    _serve(size, 200_000, tokens=1.0, ratio=2.0)
    assert size.rest == LONGEST_REST
    while size.plain_left:
        size.next_nodes()
    _serve(size, WINDOW + PROBE, tokens=3.0, ratio=2.0)
    assert size.rest == REST


def test_what_was_not_promised_is_not_tried() -> None:
    assert _serve(BatchSize(Choice(1, 0, 1.0), 1.0), 50, 1.0, 1.0) == [0] * 50


class _Scheduler:
    """Runs requests with the sizes it is given; a step takes as long as its `seconds`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, choices: list[Choice]) -> None:
        self.running: list[Any] = []
        self.sizes = TreeSizes(choices, {5: 2.0, 3: 1.6}, self)  # type: ignore[arg-type]
        self.clock = 0.0
        self.last = 0
        # Of each request's answer
        self.num_tokens = 100
        monkeypatch.setattr(tree_sizes.time, "perf_counter", lambda: self.clock)

    def step(
        self,
        names: str,
        *,
        rows: int | None = None,
        tokens: int = 1,
        seconds: float = 1.0,
        finished: str = "",
        preempted: str = "",
    ) -> int:
        self.running = [
            SimpleNamespace(request_id=n, num_output_tokens=self.num_tokens) for n in names
        ]
        drafted = self.sizes[len(names)]
        self.clock += seconds
        step = SimpleNamespace(
            num_scheduled_tokens=dict.fromkeys(names, 1 + self.last if rows is None else rows),
            scheduled_spec_decode_tokens={name: [-1] * self.last for name in names if self.last},
            num_spec_tokens_to_schedule=drafted,
            finished_req_ids=set(finished),
            preempted_req_ids=set(preempted) or None,
        )
        self.sizes.observe(step, SimpleNamespace(sampled_token_ids=[[0] * tokens for _ in names]))
        self.last = drafted
        return drafted


def test_only_uniform_steps_count(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = _Scheduler(monkeypatch, [Choice(1, 5, 1.5), Choice(2, 3, 1.2), Choice(4, 0, 1.0)])
    one, two, _ = scheduler.sizes.sizes
    assert scheduler.step("a", rows=9) == 5
    assert not one.tokens, "a prompt"
    scheduler.step("a", tokens=2, seconds=1.25)
    assert list(one.tokens) == [2.0] and list(one.seconds[5]) == [1.25]
    scheduler.step("b", tokens=3, seconds=60.0)
    assert list(one.tokens) == [2.0], "idle in between"
    assert scheduler.step("ab") == 3
    assert not two.tokens, "another batch"
    scheduler.step("ab", tokens=2)
    assert list(two.tokens) == [2.0]
    scheduler.step("ab", rows=2)
    assert list(two.tokens) == [2.0], "a grammar took nodes away"
    assert scheduler.step("abcd") == 0
    assert scheduler.step("abcdefgh") == 0, "more than start-up timed"
    assert list(one.tokens) == [2.0]


def test_who_decoded_without_is_not_drafted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = _Scheduler(monkeypatch, [Choice(1, 5, 1.5), Choice(2, 3, 1.2), Choice(4, 0, 1.0)])
    for _ in range(HOLES + 2):
        assert scheduler.step("abc") == 0
    assert scheduler.step("a") == 0
    assert scheduler.step("ax") == 3, "half of the batch has its keys"
    assert scheduler.step("a") == 0
    scheduler.step("x", preempted="a")
    assert scheduler.step("a") == 5, "computed anew after a preemption"
    assert scheduler.step("b") == 0
    scheduler.step("c", finished="b")
    assert "b" not in scheduler.sizes.holes
