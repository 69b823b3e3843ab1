"""Every name of vLLM that is replaced (for a CPU: `cpu/patches.py`), why, and the day it can go.

All of them but `COMMAND_PATCHES` ask first whether the engine at hand wants griffin, so that a plain engine
in the same process runs vLLM's own code. `build_dynamic_sd_schedule_lookup` sees no engine: there another
method's schedule of more batch sizes than its engine has requests gets graphs for all of them.

Attributes of single objects of a griffin engine are set where they are used, each with its reason: the
table of sizes by batch (`cost.py`), the scheduler's trees (`metrics.py` here), the model state's class and
the loading of weights (`runner/speculator.py`), logits processors (`runner/processors.py`), trees on their
way to the scheduler (`grammar.py`).
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from vllm_griffin.compat import metrics
from vllm_griffin.compat.patch import Patch, replace_attribute

if TYPE_CHECKING:
    from vllm.config import VllmConfig


# Fields that vLLM's own config has not; written down, since a plain engine loads no more of ours than this.
OWN_FIELDS = (
    "tree_depth",
    "tree_top_k",
    "draft_vocab_size",
    "draft_quantization",
    "tree_acceptance",
    "tree_budget",
)


def _create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        if not _wants_griffin(self):
            return original(self, target_model_config, target_parallel_config)
        asked = _plain_names(self.speculative_config or {})
        for flag, key, value in (
            ("--spec-method", "method", self.spec_method),
            ("--spec-model", "model", self.spec_model),
            ("--spec-tokens", "num_speculative_tokens", self.spec_tokens),
        ):
            if value is not None and key in asked:
                raise ValueError(f"{flag} and --speculative-config['{key}'] are mutually exclusive")
            if value is not None:
                asked[key] = value
        from vllm_griffin.compat import check_version
        from vllm_griffin.config import make_config
        from vllm_griffin.engine_features import prefer_backend

        check_version()
        # vLLM reads what is named there after this.
        prefer_backend(self)
        return make_config(
            asked,
            target_model_config=target_model_config,
            target_parallel_config=target_parallel_config,
            download_dir=self.download_dir,
        )

    return create_speculative_config


def _wants_griffin(args: Any) -> bool:
    """Whether an EngineArgs names griffin.

    Raises:
        ValueError: another method's config names it wrongly, or has its fields.
    """
    asked = args.speculative_config if isinstance(args.speculative_config, Mapping) else {}
    methods = (args.spec_method, asked.get("method"))
    if "griffin" in methods:
        return True
    for method in methods:
        if isinstance(method, str) and get_close_matches(method.lower(), ["griffin"]):
            raise ValueError(f"speculative method {method!r} is not known: did you mean 'griffin'?")
    for field in OWN_FIELDS:
        if field in asked:
            raise ValueError(
                f"speculative_config['{field}'] is a field of method 'griffin': name that method, or "
                f"leave the field out"
            )
    return False


def _plain_names(asked: Mapping[str, Any]) -> dict[str, Any]:
    """As vLLM, a config may say `tree-depth`; but not beside `tree_depth`."""
    plain: dict[str, Any] = {}
    for key, value in asked.items():
        name = str(key).replace("-", "_")
        if name in plain:
            raise ValueError(f"speculative_config['{name}'] is given twice: leave one out")
        plain[name] = value
    return plain


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_engine_config(
        self: Any, usage_context: Any = None, headless: bool = False
    ) -> "VllmConfig":
        vllm_config = original(self, usage_context, headless)
        # Asked only now: `vllm serve DRAFT` learns in there what it is to serve.
        if _wants_griffin(self):
            from vllm_griffin.engine_features import check_engine, warn_of_rows

            check_engine(vllm_config)
            warn_of_rows(vllm_config)
        return vllm_config

    return create_engine_config


def _init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_speculator(vllm_config: "VllmConfig", device: Any, req_states: Any) -> Any:
        from vllm_griffin.config import griffin_config
        from vllm_griffin.engine_features import check_engine

        if griffin_config(vllm_config) is None:
            return original(vllm_config, device, req_states)
        from vllm_griffin.runner.speculator import TreeSpeculator

        # Who builds a VllmConfig by hand has not been through EngineArgs.
        check_engine(vllm_config)
        # Their modules are loaded now, and only now.
        for patch in RUNNER_PATCHES:
            patch.apply()
        return TreeSpeculator(vllm_config, device)

    return init_speculator


def _initialize_kv_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_griffin.config import griffin_config

        original(self, *args, **kwargs)
        spec = griffin_config(self.vllm_config)
        if spec is None or spec.tree_budget is None:
            return
        from vllm_griffin.runner.budget import NodeBudget
        from vllm_griffin.runner.sampler import max_chunk_rows

        budget = NodeBudget(
            spec.tree_budget,
            self.speculator.trees,
            self.input_buffers.query_start_loc,
            max_chunk_rows(self.vocab_size),
        )
        replace_attribute(self, "adaptive_verification", budget)

    return initialize_kv_cache


def _graph_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_dynamic_sd_schedule_lookup(
        num_speculative_tokens_per_batch_size: Any,
        vllm_max_batch_size: int,
        vllm_num_speculative_tokens: int,
    ) -> list[int]:
        schedule = num_speculative_tokens_per_batch_size
        # As many batch sizes as "auto" has trees, however few requests the engine serves.
        most = max(vllm_max_batch_size, len(schedule))
        return original(schedule, most, vllm_num_speculative_tokens)

    return build_dynamic_sd_schedule_lookup


def _get_attn_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_attn_backend(*args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config_or_none

        from vllm_griffin.config import griffin_config

        backend = original(*args, **kwargs)
        if griffin_config(get_current_vllm_config_or_none()) is None:
            return backend
        from vllm_griffin.attention.backends import tree_backend

        return tree_backend(backend)

    return get_attn_backend


def _engine_core_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        from vllm_griffin.cost import adapt

        adapt(self)

    return __init__


def _validate_spec_decode(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_spec_decode(self: Any, speculative_config: Any) -> None:
        from vllm_griffin.config import GriffinSpeculativeConfig

        if not isinstance(speculative_config, GriffinSpeculativeConfig):
            original(self, speculative_config)

    return validate_spec_decode


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_griffin.config import griffin_config

        request = original(self, *args, **kwargs)
        if griffin_config(self.vllm_config) is not None and request.sampling_params is not None:
            from vllm_griffin.request_limits import check_request

            check_request(request.sampling_params, len(request.prompt_token_ids))
        return request

    return process_inputs


def _set_draft_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_draft_tokens(self: Any, input_batch: Any, draft_tokens: Any) -> None:
        from vllm_griffin.grammar import carry_parents

        original(self, input_batch, carry_parents(input_batch, draft_tokens))

    return set_draft_tokens


def _validate_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_tokens(self: Any, request: Any, spec_tokens: list[int]) -> list[int]:
        from vllm_griffin.config import griffin_config

        if griffin_config(self.vllm_config) is None:
            return original(self, request, spec_tokens)
        # A node outside the grammar has siblings inside, and its parent's bitmask bars it.
        return spec_tokens

    return validate_tokens


def _grammar_bitmask(original: Callable[..., Any]) -> Callable[..., Any]:
    def grammar_bitmask(
        self: Any,
        requests: dict[str, Any],
        structured_output_request_ids: list[str],
        scheduled_spec_decode_tokens: dict[str, list[int]],
    ) -> Any:
        from vllm_griffin.config import griffin_config

        args = (requests, structured_output_request_ids, scheduled_spec_decode_tokens)
        if griffin_config(self.vllm_config) is None:
            return original(self, *args)
        from vllm_griffin.grammar import fill_bitmask

        return fill_bitmask(self, *args)

    return grammar_bitmask


def _decorate_cls_for_torch_compile(original: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(
        self: Any, cls: Any, dynamic_arg_dims: Any, enable_if: Any, is_encoder: bool
    ) -> None:
        from vllm.config import CompilationMode

        if self.compilation_config.mode != CompilationMode.NONE:
            original(self, cls, dynamic_arg_dims, enable_if, is_encoder)

    return decorate


# Of our commands that run a plain engine and the target's Hugging Face model in one process.
COMMAND_PATCHES = (
    Patch(
        module="vllm.model_executor.models.transformers.base",
        name="Base._decorate_cls_for_torch_compile",
        parameters=("self", "cls", "dynamic_arg_dims", "enable_if", "is_encoder"),
        replacement=_decorate_cls_for_torch_compile,
        reason="vLLM prepares the model's Hugging Face class for its compiler, also in an eager engine, and "
        "from then on no model of that class can be made outside of vLLM",
        until="vLLM decorates a class of its own, or none where nothing is compiled",
    ),
)

CONFIG_PATCHES = (
    Patch(
        module="vllm.engine.arg_utils",
        name="EngineArgs.create_speculative_config",
        parameters=("self", "target_model_config", "target_parallel_config"),
        replacement=_create_speculative_config,
        reason="vLLM's SpeculativeConfig takes a closed list of methods and no tree fields",
        until="vLLM lets a plugin register a speculative method with fields of its own",
    ),
    Patch(
        module="vllm.engine.arg_utils",
        name="EngineArgs.create_engine_config",
        parameters=("self", "usage_context", "headless"),
        replacement=_create_engine_config,
        reason="what griffin cannot do yet is refused at start-up, which needs the whole config",
        until="vLLM asks a speculative method to validate the engine's config",
    ),
)

WORKER_PATCHES = (
    Patch(
        module="vllm.v1.worker.gpu.spec_decode",
        name="init_speculator",
        parameters=("vllm_config", "device", "req_states"),
        replacement=_init_speculator,
        reason="Model Runner V2 builds its speculator from a closed list of methods",
        until="vLLM lets a plugin register a speculator",
        imported_by=("vllm.v1.worker.gpu.model_runner",),
    ),
    Patch(
        module="vllm.v1.attention.selector",
        name="get_attn_backend",
        parameters=(
            "head_size",
            "dtype",
            "kv_cache_dtype",
            "use_mla",
            "has_sink",
            "use_sparse",
            "use_mm_prefix",
            "use_per_head_quant_scales",
            "attn_type",
            "num_heads",
            "has_sliding_window",
        ),
        replacement=_get_attn_backend,
        reason="no backend of vLLM can mask a different tree for each request",
        until="a backend takes per-request ancestor masks, or one can be chosen per engine by name",
        imported_by=("vllm.model_executor.layers.attention.attention",),
    ),
    Patch(
        module="vllm.v1.worker.gpu.spec_decode.utils",
        name="DraftTokensHandler.set_draft_tokens",
        parameters=("self", "input_batch", "draft_tokens"),
        replacement=_set_draft_tokens,
        reason="the scheduler, which fills grammar bitmasks, is told draft tokens without their shape",
        until="draft tokens travel to the scheduler with their parents",
    ),
)

RUNNER_PATCHES = (
    Patch(
        module="vllm.v1.worker.gpu.model_runner",
        name="GPUModelRunner.initialize_kv_cache",
        parameters=("self", "kv_cache_config", "is_profiling", "kv_cache_allocation_context"),
        replacement=_initialize_kv_cache,
        reason="the runner lets only dspark's manager trim drafts on the device, which wants CUDA graphs",
        until="a speculator can bring a manager of its own",
    ),
    Patch(
        module="vllm.v1.worker.gpu.cudagraph_utils",
        name="build_dynamic_sd_schedule_lookup",
        parameters=(
            "num_speculative_tokens_per_batch_size",
            "vllm_max_batch_size",
            "vllm_num_speculative_tokens",
        ),
        replacement=_graph_sizes,
        reason="graphs are captured for the sizes of the first batch sizes only, and any tree may be chosen",
        until="graphs are captured for each size of the schedule",
    ),
)

ENGINE_CORE_PATCHES = (
    Patch(
        module="vllm.v1.engine.core",
        name="EngineCore.__init__",
        parameters=(
            "self",
            "vllm_config",
            "executor_class",
            "log_stats",
            "executor_fail_callback",
            "include_finished_set",
        ),
        replacement=_engine_core_init,
        reason="tree sizes are chosen by timed steps, which need workers and scheduler, before requests come",
        until="vLLM calls a speculative method when an engine is ready",
    ),
    Patch(
        module="vllm.v1.structured_output",
        name="StructuredOutputManager.validate_tokens",
        parameters=("self", "request", "spec_tokens"),
        replacement=_validate_tokens,
        reason="drafts are cut at the first token that does not continue the one before it",
        until="vLLM validates drafts along a tree",
    ),
    Patch(
        module="vllm.v1.structured_output",
        name="StructuredOutputManager.grammar_bitmask",
        parameters=(
            "self",
            "requests",
            "structured_output_request_ids",
            "scheduled_spec_decode_tokens",
        ),
        replacement=_grammar_bitmask,
        reason="a draft's bitmask takes the drafts before it for its text",
        until="vLLM fills grammar bitmasks along a tree",
    ),
)

REQUEST_PATCHES = (
    Patch(
        module="vllm.sampling_params",
        name="SamplingParams._validate_spec_decode",
        parameters=("self", "speculative_config"),
        replacement=_validate_spec_decode,
        reason="min_p and logit_bias are refused under any speculative config, though Model Runner "
        "V2's sampler, which draws at every row of a tree, applies both row by row",
        until="vLLM asks a speculative method which sampling parameters it honours",
    ),
    Patch(
        module="vllm.v1.engine.input_processor",
        name="InputProcessor.process_inputs",
        parameters=(
            "self",
            "request_id",
            "prompt",
            "params",
            "supported_tasks",
            "arrival_time",
            "lora_request",
            "tokenization_kwargs",
            "trace_headers",
            "priority",
            "data_parallel_rank",
            "resumable",
            "session_id",
            "kv_hints",
        ),
        replacement=_process_inputs,
        reason="parameters that do not fit Model Runner V2's arrays raise in the worker and end all requests",
        until="vLLM's front end checks them",
    ),
)

METRICS_PATCHES = (
    Patch(
        module="vllm.v1.worker.gpu.async_utils",
        name="AsyncOutput.get_output",
        parameters=("self",),
        replacement=metrics.get_output,
        reason="what a step saw of its trees rides behind the sampled tokens, on their copy to the host",
        until="a speculator can add tensors of its own to the step's copy to the host",
    ),
    Patch(
        module="vllm.v1.core.sched.scheduler",
        name="Scheduler.update_from_output",
        parameters=("self", "scheduler_output", "model_runner_output"),
        replacement=metrics.update_from_output,
        reason="neither the count of a draft nor the choice of its size is given the step's output, and "
        "what a shared budget leaves unverified is not counted",
        until="make_spec_decoding_stats and a size's chooser are given the step's output",
    ),
    Patch(
        module="vllm.v1.core.sched.scheduler",
        name="Scheduler.make_spec_decoding_stats",
        parameters=(
            "self",
            "spec_decoding_stats",
            "num_draft_tokens",
            "num_accepted_tokens",
            "num_invalid_spec_tokens",
            "request_id",
        ),
        replacement=metrics.make_spec_decoding_stats,
        reason="SpecDecodingStats knows chains only: a position for each drafted token, no siblings",
        until="a speculative method can bring statistics of its own",
    ),
    Patch(
        module="vllm.v1.engine.core_client",
        name="MPClient.__init__",
        parameters=(
            "self",
            "asyncio_mode",
            "vllm_config",
            "executor_class",
            "log_stats",
            "client_addresses",
            "renderer",
        ),
        replacement=metrics.init_client,
        reason="the front end decodes by declared types and drops what SpecDecodingStats has not",
        until="SchedulerStats carries statistics of a plugin",
    ),
    Patch(
        module="vllm.v1.spec_decode.metrics",
        name="SpecDecodingProm.__init__",
        parameters=(
            "self",
            "speculative_config",
            "labelnames",
            "per_engine_labelvalues",
            "is_diffusion",
        ),
        replacement=metrics.init_prometheus,
        reason="a position per drafted token would be a zero for each node beyond the tree's depth",
        until="vLLM asks the speculative method how many tokens a step can accept",
    ),
    Patch(
        module="vllm.v1.metrics.loggers",
        name="StatLoggerManager.__init__",
        parameters=(
            "self",
            "vllm_config",
            "engine_idxs",
            "custom_stat_loggers",
            "enable_default_loggers",
            "aggregate_engine_logging",
            "client_count",
        ),
        replacement=metrics.init_loggers,
        reason="LLM loads no stat logger plugins, and vLLM unregisters what they register",
        until="LLM loads them too, after vLLM's own loggers",
    ),
)

# What a process that runs an engine which asked for griffin needs.
ENGINE_PATCHES = WORKER_PATCHES + ENGINE_CORE_PATCHES + REQUEST_PATCHES + METRICS_PATCHES
