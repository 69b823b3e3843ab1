"""Shows the trees' counts: Prometheus counters, and a log line at vLLM's own interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from vllm_griffin.config import griffin_config
from vllm_griffin.metrics.stats import TreeStats

# A child of vLLM's logger, so that the line has its level, format and destination.
logger = init_logger("vllm.griffin.metrics")


@dataclass(frozen=True)
class Metric:
    """One counter.

    Attributes:
        name: as Prometheus has it, ``_total`` left out.
        help: one sentence.
        field: what it adds up, a field of TreeStats.
        label: for a list, the label whose values number its entries.
        first: that label's first value.

    """

    name: str
    help: str
    field: str
    label: str | None = None
    first: int = 0


METRICS = (
    Metric("vllm:griffin_num_trees", "Verified draft trees.", "num_trees"),
    Metric("vllm:griffin_num_tree_nodes", "Verified nodes of draft trees.", "num_tree_nodes"),
    Metric(
        "vllm:griffin_num_accepted_tokens_beyond_spine",
        "Accepted tokens that the trees' spines alone would not have given.",
        "num_accepted_beyond_spine",
    ),
    Metric(
        "vllm:griffin_num_trees_per_pos",
        "Verified draft trees that have a node at this position (depth - 1).",
        "num_trees_per_pos",
        label="position",
    ),
    Metric(
        "vllm:griffin_num_accepted_tokens_per_rank",
        "Accepted tokens by rank among their siblings (1 = the draft's best child).",
        "num_accepted_per_rank",
        label="rank",
        first=1,
    ),
)


class TreeStatLogger(AggregateStatLoggerBase):
    """One for all engines of a front end.

    Args:
        vllm_config: the config of an engine that asked for griffin.
        engine_indexes: the engines, each a value of the label ``engine``.
        counter_cls: ``prometheus_client.Counter``, or what stands in its place under Ray.
        log_line: whether vLLM logs its own statistics.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        engine_indexes: list[int],
        counter_cls: Callable[..., Any],
        log_line: bool,
    ) -> None:
        config = griffin_config(vllm_config)
        assert config is not None
        self.config = config
        self.log_line = log_line
        self.interval = TreeStats.for_config(config)
        model_name = vllm_config.model_config.served_model_name
        # (metric, engine) -> its counters, one for each entry of the field
        self.counters: dict[tuple[Metric, int], list[Any]] = {}
        for metric in METRICS:
            labels = ["model_name", "engine", *([metric.label] if metric.label else [])]
            counter = counter_cls(name=metric.name, documentation=metric.help, labelnames=labels)
            size = len(_entries(self.interval, metric))
            values = [[str(metric.first + i)] if metric.label else [] for i in range(size)]
            for engine in engine_indexes:
                self.counters[metric, engine] = [
                    counter.labels(model_name, str(engine), *value) for value in values
                ]

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Adds what one step of one engine counted."""
        stats = None if scheduler_stats is None else scheduler_stats.spec_decoding_stats
        if not isinstance(stats, TreeStats):
            return
        self.interval.add(stats)
        for metric in METRICS:
            counters = self.counters[metric, engine_idx]
            for counter, number in zip(counters, _entries(stats, metric), strict=True):
                counter.inc(number)

    def log(self) -> None:
        """Logs the interval since the last call, if there were trees in it."""
        if self.log_line and self.interval.num_trees:
            logger.info(*describe(self.interval))
        self.interval = TreeStats.for_config(self.config)

    def log_engine_initialized(self) -> None:
        """There is nothing to say yet."""


def _entries(stats: TreeStats, metric: Metric) -> list[int]:
    value = getattr(stats, metric.field)
    return value if metric.label else [value]


def describe(stats: TreeStats) -> tuple[str, float, float, str, str]:
    """The log line's format and arguments, in the manner of vLLM's "SpecDecoding metrics"."""
    accepted = sum(stats.num_accepted_per_rank)
    return (
        "Draft tree metrics: "
        "Gain over spine: %.2f tokens per tree, "
        "Nodes verified per accepted token: %.1f, "
        "Per-depth acceptance rate: %s, "
        "Accepted tokens by sibling rank: %s",
        stats.num_accepted_beyond_spine / stats.num_trees,
        stats.num_tree_nodes / accepted if accepted else math.nan,
        _rates(stats.num_accepted_tokens_per_pos, stats.num_trees_per_pos),
        _rates(stats.num_accepted_per_rank, [accepted] * len(stats.num_accepted_per_rank)),
    )


def _rates(parts: Sequence[int], wholes: Sequence[int]) -> str:
    """Shares to three digits; one of nothing is ``nan``."""
    rates = (part / whole if whole else math.nan for part, whole in zip(parts, wholes, strict=True))
    return ", ".join(f"{rate:.3f}" for rate in rates)
