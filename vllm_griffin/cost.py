"""Which tree pays on this machine: steps are timed at start-up, acceptance is the draft's own figure.

A step with n drafted nodes in a batch of b requests takes t(b, n) and gives A(n) tokens a request, a plain
one t(b, 0) and one token; so drafting is worth A(n) * t(b, 0) / t(b, n). What is timed are true steps of
the engine, with requests that nobody sent, so nothing has to be modelled.

Shape letters: b requests of a batch, n nodes of a tree.
"""

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.logger import init_logger
from vllm.v1.request import Request

from vllm_griffin.compat.patch import replace_attribute
from vllm_griffin.config import griffin_config
from vllm_griffin.trace import START_UP
from vllm_griffin.tree_sizes import Choice, TreeSizes

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

# vLLM shows what is logged below its own name.
logger = init_logger("vllm.griffin.cost")

# Drafting must promise this much to be tried on real requests: acceptance on the prompts to come is a guess.
WORTH = 1.1
# A larger tree must promise so much more than a smaller one: times at start-up scatter by some per cent,
# and contexts to come are longer than those timed, which larger trees feel more.
LARGER = 1.05
# A tree that promises less than this is timed once; the others in so many rounds.
HOPELESS, ROUNDS = 0.9, 3
PROMPT_TOKENS = 16
WARM_STEPS, TIMED_STEPS = 3, 5


def adapt(core: "EngineCore") -> None:
    """Time the engine's steps and set its tree sizes by batch size; no-op unless they are "auto"."""
    spec = griffin_config(core.vllm_config)
    if spec is None or not spec.adaptive:
        return
    lengths = spec.acceptance_by_nodes()
    most = core.vllm_config.scheduler_config.max_num_seqs
    logger.info(
        "griffin: timing steps of up to %d requests with trees of %s nodes, to choose a tree by batch size",
        most,
        ", ".join(map(str, lengths)),
    )
    start = time.perf_counter()
    timer = StepTimer(core)
    # An engine's first steps are slow; plain ones, timed first, must not look so.
    for nodes in (max(lengths), 0):
        timer.seconds(1, nodes)
    choices = choose(timer, lengths, most)
    scheduler: Any = core.scheduler
    replace_attribute(scheduler, "dynamic_sd_lookup", TreeSizes(choices, lengths, scheduler))
    _set_drafting(core, choices[0].nodes > 0)
    logger.info(
        "griffin: tree sizes measured in %.1f s. %s",
        time.perf_counter() - start,
        describe(choices, {shape.nodes: str(shape) for shape in spec.trees}),
    )


def context_needed(levels: int, nodes: int, requests: int, tokens_per_step: int) -> int:
    """Tokens of context that the timed steps may take, if all that is drafted were accepted."""
    prefill = math.ceil(requests * PROMPT_TOKENS / tokens_per_step)
    return PROMPT_TOKENS + (prefill + WARM_STEPS + TIMED_STEPS) * (1 + levels) + nodes


def choose(timer: "StepTimer", lengths: Mapping[int, float], most: int) -> list[Choice]:
    """The best tree at batch sizes 1, 2, 4 .. `most`; larger ones than the first that has none are not timed.

    Args:
        timer: Gives seconds of a step by (b, n), infinity where a step cannot hold that.
        lengths: Acceptance length by n.
        most: The engine's largest batch.
    """
    choices = []
    for batch in _powers_of_two(most):
        plain = [timer.seconds(batch, 0)]
        if plain[0] == math.inf:
            break
        best = Choice(batch, 0, 1.0)
        most_ratio = 1.0
        for nodes, length in sorted(lengths.items()):
            # A larger tree takes no less time than a smaller one.
            if length * most_ratio < WORTH:
                continue
            ratio = _ratio(timer, batch, nodes, length, plain)
            most_ratio = min(most_ratio, ratio)
            speedup = length * ratio
            if speedup >= max(WORTH, LARGER * best.speedup):
                best = Choice(batch, nodes, speedup)
        choices.append(best)
        if best.nodes == 0:
            break
    # Where not even one request can be timed, no tree is known to pay.
    return choices or [Choice(1, 0, 1.0)]


def _ratio(timer: "StepTimer", batch: int, nodes: int, length: float, plain: list[float]) -> float:
    """Time of a plain step over that of a step with a tree: the median of some rounds.

    A machine's speed drifts, so each tree is timed between two plain steps, whose times `plain` takes.
    """
    ratios: list[float] = []
    for _ in range(ROUNDS):
        tree = timer.seconds(batch, nodes)
        if not ratios and length * plain[-1] / tree < HOPELESS:
            return plain[-1] / tree
        plain.append(timer.seconds(batch, 0))
        ratios.append(statistics.fmean(plain[-2:]) / tree)
    return statistics.median(ratios)


def describe(choices: Sequence[Choice], names: Mapping[int, str]) -> str:
    """For the log: which tree at which batch size, and what it is expected to bring."""
    if choices[0].nodes == 0:
        return "No tree pays here: drafting is off"
    trees = [
        f"up to {choice.batch}: tree {names[choice.nodes]} ({choice.speedup:.2f}x)"
        for choice in choices
        if choice.nodes
    ]
    if len(trees) < len(choices):
        trees.append("more: no drafting")
    return "Requests of a step, tree, speed expected: " + ", ".join(trees)


class StepTimer:
    """Runs the engine's own steps and takes their times."""

    def __init__(self, core: "EngineCore") -> None:
        self.core = core
        self.numbers = itertools.count()

    def seconds(self, batch: int, nodes: int) -> float:
        """Median time of a decode step of `batch` requests with `nodes` drafted for each.

        Infinity if one step cannot hold them all: by its token budget, the cache, or the context.
        """
        core = self.core
        scheduler: Any = core.scheduler
        if batch * (1 + nodes) > scheduler.max_num_scheduled_tokens:
            return math.inf
        _set_drafting(core, nodes > 0)
        replace_attribute(
            scheduler, "dynamic_sd_lookup", [nodes] * len(scheduler.dynamic_sd_lookup)
        )
        ids = [f"{START_UP}{next(self.numbers)}" for _ in range(batch)]
        for request_id in ids:
            core.add_request(self._request(request_id))
        times: list[float] = []
        # Prompts take several steps, the more so where requests that decode already leave little room.
        prefill = math.ceil(batch * PROMPT_TOKENS / scheduler.max_num_scheduled_tokens)
        prefill += PROMPT_TOKENS * batch.bit_length()
        for _ in range(prefill + WARM_STEPS + TIMED_STEPS):
            start = time.perf_counter()
            outputs, executed = core.step_fn()
            core.post_step(executed)
            answered = sum(len(found.outputs) for found in (outputs or {}).values())
            # Only steps in a row in which each request gets tokens are what is timed.
            times = [*times, time.perf_counter() - start] if answered == batch else []
            if len(times) == WARM_STEPS + TIMED_STEPS or not scheduler.has_requests():
                break
        core.abort_requests(ids)
        while scheduler.has_requests() or core.batch_queue:
            _, executed = core.step_fn()
            core.post_step(executed)
        core.reset_prefix_cache()
        complete = len(times) == WARM_STEPS + TIMED_STEPS
        return statistics.median(times[WARM_STEPS:]) if complete else math.inf

    def _request(self, request_id: str) -> Request:
        prompt = list(range(PROMPT_TOKENS))
        params = SamplingParams(
            temperature=0.0, max_tokens=10**6, ignore_eos=True, detokenize=False
        )
        # Full blocks are cached under their hashes, as those of other requests.
        hasher = self.core.request_block_hasher
        return Request(request_id, prompt, params, None, block_hasher=hasher)


def _set_drafting(core: "EngineCore", drafting: bool) -> None:
    core.collective_rpc(_set_worker_drafting, args=(drafting,))


def _set_worker_drafting(worker: Any, drafting: bool) -> None:
    """Runs in each worker. Without drafting the draft's cache is not kept up either."""
    worker.model_runner.speculator.drafting = drafting


def _powers_of_two(most: int) -> Iterator[int]:
    size = 1
    while size < most:
        yield size
        size *= 2
    yield most
