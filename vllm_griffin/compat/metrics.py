"""Replacements for the metrics' patches: a tree's numbers on their way from the worker to Prometheus.

worker        TreeVerifier -> sampled tokens, widened -> `get_output` -> TreeRunnerOutput
scheduler     `update_from_output` keeps it, `make_spec_decoding_stats` counts -> TreeStats
front end     the client's decoder -> TreeSchedulerStats -> `StatLoggerManager` -> TreeStatLogger
"""

from collections.abc import Callable
from typing import Any

from vllm_griffin.compat.patch import replace_attribute


def get_output(original: Callable[..., Any]) -> Callable[..., Any]:
    """``AsyncOutput.get_output``: takes the trees' columns off the sampled tokens."""

    def get_output(self: Any) -> Any:
        from vllm_griffin.runner.output import (
            TreeRunnerOutput,
            TreeSamplerOutput,
            split_columns,
        )

        if not isinstance(self.sampler_output, TreeSamplerOutput):
            return original(self)
        columns = split_columns(self)
        output = original(self)
        path_ranks = dict(zip(output.req_ids, columns, strict=True))
        return TreeRunnerOutput(**vars(output), path_ranks=path_ranks)

    return get_output


def update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Scheduler.update_from_output``: keeps the step's trees for the counting inside it.

    With a shared budget of nodes, says how many scheduled drafts were not verified; where the engine chooses
    its trees, shows the step to the chooser.
    """

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        from vllm_griffin.config import griffin_config

        config = griffin_config(self.vllm_config)
        if config is not None:
            from vllm_griffin.tree_sizes import TreeSizes

            self.griffin_path_ranks = getattr(model_runner_output, "path_ranks", {})
            if config.tree_budget is not None:
                # vLLM's own number for drafts that were scheduled and not verified.
                unverified = {
                    name: len(drafts) - self.griffin_path_ranks[name][0]
                    for name, drafts in scheduler_output.scheduled_spec_decode_tokens.items()
                    if name in self.griffin_path_ranks
                }
                replace_attribute(scheduler_output, "num_invalid_spec_tokens", unverified)
            if isinstance(self.dynamic_sd_lookup, TreeSizes):
                self.dynamic_sd_lookup.observe(scheduler_output, model_runner_output)
        return original(self, scheduler_output, model_runner_output)

    return update_from_output


def make_spec_decoding_stats(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Scheduler.make_spec_decoding_stats``: counts trees where vLLM counts drafts."""

    def make_spec_decoding_stats(
        self: Any,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        from vllm_griffin.config import griffin_config

        config = griffin_config(self.vllm_config)
        if config is not None and spec_decoding_stats is None:
            from vllm_griffin.metrics.stats import TreeStats

            spec_decoding_stats = TreeStats.for_config(config)
        stats = original(
            self,
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )
        if config is not None and stats is not None:
            stats.observe_tree(self.griffin_path_ranks[request_id])
        return stats

    return make_spec_decoding_stats


def init_client(original: Callable[..., Any]) -> Callable[..., Any]:
    """``MPClient.__init__``: decodes the engine core's messages with the trees' counts."""

    def init_client(self: Any, asyncio_mode: bool, vllm_config: Any, *args: Any, **kw: Any) -> None:
        from vllm_griffin.config import griffin_config

        original(self, asyncio_mode, vllm_config, *args, **kw)
        if griffin_config(vllm_config) is not None:
            from vllm.v1.serial_utils import MsgpackDecoder

            from vllm_griffin.metrics.stats import TreeEngineCoreOutputs

            replace_attribute(self, "decoder", MsgpackDecoder(TreeEngineCoreOutputs))

    return init_client


def init_prometheus(original: Callable[..., Any]) -> Callable[..., Any]:
    """``SpecDecodingProm.__init__``: as many positions as a tree has levels, not nodes."""

    def init_prometheus(self: Any, speculative_config: Any, *args: Any, **kw: Any) -> None:
        from types import SimpleNamespace

        from vllm_griffin.config import GriffinSpeculativeConfig

        if isinstance(speculative_config, GriffinSpeculativeConfig):
            # All that vLLM reads of it here.
            levels = speculative_config.tree_levels
            speculative_config = SimpleNamespace(num_speculative_tokens=levels)
        original(self, speculative_config, *args, **kw)

    return init_prometheus


def init_loggers(original: Callable[..., Any]) -> Callable[..., Any]:
    """``StatLoggerManager.__init__``: ours comes last, so that its line follows vLLM's own."""

    def init_loggers(
        self: Any,
        vllm_config: Any,
        engine_idxs: list[int] | None = None,
        custom_stat_loggers: list[Any] | None = None,
        enable_default_loggers: bool = True,
        aggregate_engine_logging: bool = False,
        client_count: int = 1,
    ) -> None:
        from vllm_griffin.config import griffin_config

        original(
            self,
            vllm_config,
            engine_idxs,
            custom_stat_loggers,
            enable_default_loggers,
            aggregate_engine_logging,
            client_count,
        )
        if griffin_config(vllm_config) is None:
            return
        from vllm.v1.metrics.loggers import PrometheusStatLogger

        from vllm_griffin.metrics.logger import TreeStatLogger

        prometheus = next(x for x in self.stat_loggers if isinstance(x, PrometheusStatLogger))
        self.stat_loggers.append(
            TreeStatLogger(
                vllm_config,
                self.engine_indexes,
                counter_cls=prometheus._counter_cls,
                log_line=enable_default_loggers and client_count == 1,
            )
        )

    return init_loggers
