"""The tree of each step, where the engine chooses: start-up's promise first, then what real steps show.

What start-up promises (`cost`) rests on the draft's own acceptance figure and on steps of short requests.
Prompts may be others, contexts longer, the machine busier. So drafting is judged while it serves: at a
batch size it is worth

    tokens of a request in a step with a tree * seconds of a plain step / seconds of a step with a tree.

Below 1 it rests, and is tried again after a while, which doubles with each failure. Now and then a few plain
steps keep the comparison fresh. All of it happens in the scheduler's process; workers are told sizes only.
"""

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
# A request that decoded more plain steps than this has a draft cache too full of holes to draft well.
HOLES = 32


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
            return
        self.tokens.append(tokens)
        if len(self.tokens) < TRIAL:
            return
        worth = self.worth()
        if worth < 1:
            logger.info(
                "griffin: trees of %d nodes make batches of up to %d %.2f times as fast here: the next %d "
                "steps go without",
                nodes,
                self.batch,
                worth,
                self.rest,
            )
            self.plain_left = self.rest
            self.rest = min(2 * self.rest, LONGEST_REST)
            self.tokens.clear()
            self.seconds[nodes].clear()
        elif len(self.tokens) == WINDOW:
            self.rest = REST

    def worth(self) -> float:
        """How many times as fast trees make this batch size, by its own steps as far as they are known."""
        plain, with_tree = self.seconds[0], self.seconds[self.nodes]
        ratio = self.promised_ratio
        if min(len(plain), len(with_tree)) >= FEWEST_TIMES:
            ratio = statistics.median(plain) / statistics.median(with_tree)
        return statistics.fmean(self.tokens) * ratio


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
        with_holes = sum(self.holes[r.request_id] > HOLES for r in running)
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
