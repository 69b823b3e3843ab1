"""The tree of each step, where the engine chooses: start-up's promise first, then what real steps show.

What start-up promises (`cost`) rests on the draft's own acceptance figure and on steps of short requests.
Prompts may be others, contexts longer, the machine busier. So drafting is judged while it serves: at a
batch size it is worth

    tokens of a request in a step with a tree * seconds of a plain step / seconds of a step with a tree.

Below 1 it rests, and is tried again after a while, which doubles with each failure. Few steps must be clearly
below, as tokens come in bursts; and contexts grow, so plain steps that lie back are taken anew first. Now and
then a few of them keep the comparison fresh. All of it happens in the scheduler's process; workers are told
sizes only.
"""

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

logger = init_logger("vllm.griffin.tree_sizes")

# Steps with trees before they are judged, and those whose tokens count.
TRIAL, WINDOW = 16, 64
# Steps whose time counts, and the fewest that give a time.
TIMES, FEWEST_TIMES = 16, 4
# Plain steps for comparison: after so many steps with trees, then each time after so many.
FIRST_PROBE, PROBE_EVERY, PROBE = 32, 512, 8
# Plain steps after trees did not pay: at first, and at most.
REST, LONGEST_REST = 256, 16384
# A request that decoded more plain steps than both, so many and such a share of its answer, has a draft cache
# too full of holes to draft well. The regular probes stay below that share.
HOLES, HOLES_SHARE = 32, 1 / 16


@dataclass(frozen=True)
class Choice:
    """What is drafted for batches of up to `batch` requests: `nodes` (0: nothing), for so much speed."""

    batch: int
    nodes: int
    speedup: float


class BatchSize:
    """Steps of one batch size: with trees of `nodes` nodes, and plain ones.

    Args:
        choice: What start-up chose.
        length: The acceptance length with which it did.
    """

    def __init__(self, choice: Choice, length: float) -> None:
        self.batch, self.nodes = choice.batch, choice.nodes
        self.promised_ratio = choice.speedup / length
        self.tokens: deque[float] = deque(maxlen=WINDOW)
        self.seconds: dict[int, deque[float]] = {
            size: deque(maxlen=TIMES) for size in (0, choice.nodes)
        }
        self.rest = REST
        self.plain_left = 0
        self.drafted = 0
        # Steps with trees since the last plain one, or since plain ones were asked for to judge by.
        self.since_plain = 0
        self.probed = False

    def next_nodes(self) -> int:
        """Nodes that the next step drafts."""
        if self.nodes == 0:
            return 0
        if self.plain_left > 0:
            self.plain_left -= 1
            return 0
        self.drafted += 1
        if self.drafted % PROBE_EVERY == FIRST_PROBE:
            self.plain_left = PROBE
        return self.nodes

    def observe(self, nodes: int, tokens: float, seconds: float) -> None:
        """A step that verified and drafted `nodes` nodes for each request, and gave each `tokens` tokens."""
        if nodes not in self.seconds:
            return
        self.seconds[nodes].append(seconds)
        if nodes == 0:
            self.since_plain = 0
            return
        self.since_plain += 1
        self.tokens.append(tokens)
        if len(self.tokens) >= TRIAL:
            self._judge()

    def _judge(self) -> None:
        """Ends drafting for a while, or has plain steps timed anew, where trees do not pay."""
        full = len(self.tokens) == WINDOW
        # Of few steps the mean may be low by chance: two standard errors.
        doubt = 0.0 if full else 2 * statistics.stdev(self.tokens) / math.sqrt(len(self.tokens))
        worth = (statistics.fmean(self.tokens) + doubt) * self.ratio()
        if worth >= 1:
            self.probed = False
            if full:
                self.rest = REST
        elif self.probed and self.since_plain <= TRIAL and len(self.seconds[0]) < FEWEST_TIMES:
            # Steps that were scheduled before the probe come first.
            return
        elif self.since_plain > TRIAL and not self.probed:
            self.plain_left, self.probed, self.since_plain = PROBE, True, 0
            self.seconds[0].clear()
        else:
            self._go_without(worth)

    def _go_without(self, worth: float) -> None:
        logger.info(
            "griffin: trees of %d nodes make batches of up to %d %.2f times as fast here: the next %d "
            "steps go without",
            *(self.nodes, self.batch, worth, self.rest),
        )
        self.plain_left = self.rest
        self.rest = min(2 * self.rest, LONGEST_REST)
        self.probed = False
        self.tokens.clear()
        self.seconds[self.nodes].clear()

    def ratio(self) -> float:
        """Time of a plain step over that of one with a tree, by own steps as far as they are known."""
        plain, with_tree = self.seconds[0], self.seconds[self.nodes]
        if min(len(plain), len(with_tree)) >= FEWEST_TIMES:
            return statistics.median(plain) / statistics.median(with_tree)
        return self.promised_ratio


class TreeSizes:
    """Nodes by batch size, in the place of vLLM's fixed list (``Scheduler.dynamic_sd_lookup``).

    Args:
        choices: What start-up chose, by rising batch size.
        lengths: Acceptance length by nodes.
        scheduler: Whose requests they are for.
    """

    def __init__(
        self, choices: Sequence[Choice], lengths: Mapping[int, float], scheduler: "Scheduler"
    ) -> None:
        self.sizes = [BatchSize(c, lengths.get(c.nodes, 1.0)) for c in choices]
        self.scheduler = scheduler
        # Plain steps of each request since its prompt: of their tokens the draft has no keys.
        self.holes: Counter[str] = Counter()
        self.last_requests: frozenset[str] = frozenset()
        self.last_time = 0.0

    def __getitem__(self, batch: int) -> int:
        """Nodes that a step of `batch` requests drafts for each; asked once a step."""
        running = self.scheduler.running
        # Trees of all requests may not fit into one step, which then has fewer of them.
        size = self.at(max(batch, len(running)))
        if size is None:
            return 0
        with_holes = sum(
            self.holes[r.request_id] > max(HOLES, HOLES_SHARE * r.num_output_tokens)
            for r in running
        )
        return 0 if 2 * with_holes > len(running) else size.next_nodes()

    def at(self, batch: int) -> BatchSize | None:
        """Who judges batches of this size; None where start-up chose nothing."""
        return next((size for size in self.sizes if batch <= size.batch), None)

    def observe(self, step: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Counts a step that is done. Called once for each, in their order."""
        now = time.perf_counter()
        # A preempted request's text is computed anew.
        for request_id in step.finished_req_ids | (step.preempted_req_ids or set()):
            self.holes.pop(request_id, None)
        requests = frozenset(step.num_scheduled_tokens)
        drafted = step.num_spec_tokens_to_schedule
        verified = {len(step.scheduled_spec_decode_tokens.get(r, ())) for r in requests}
        rows = set(step.num_scheduled_tokens.values())
        # No prompt, one size from end to end; and the engine was not idle since the last step.
        if rows == {1 + drafted} and verified == {drafted} and requests == self.last_requests:
            size = self.at(len(requests))
            tokens = sum(map(len, output.sampled_token_ids)) / len(requests)
            if size is not None:
                size.observe(drafted, tokens, now - self.last_time)
        if drafted == 0:
            self.holes.update(r for r, n in step.num_scheduled_tokens.items() if n == 1)
        self.last_requests, self.last_time = requests, now
