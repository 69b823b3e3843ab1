"""An engine's features at start-up: what griffin does not support is refused, by name."""

from typing import TYPE_CHECKING

from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_griffin.config import QUANTISED_CACHES, GriffinSpeculativeConfig, griffin_config
from vllm_griffin.environment import check_environment
from vllm_griffin.model.checkpoint import DraftCheckpoint

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger("vllm.griffin.config")


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuses engine features that griffin does not support yet, and a draft that cannot be loaded.

    Raises:
        ValueError: names the feature or the file, and what to do.
    """
    for feature, present, advice in _engine_features(vllm_config):
        if present:
            raise ValueError(f"method 'griffin' does not support {feature}: {advice}")
    check_environment()
    spec = griffin_config(vllm_config)
    assert spec is not None
    _check_timing(vllm_config, spec)
    checkpoint = DraftCheckpoint.open(spec.draft_model_config.model)
    checkpoint.config.check_context(vllm_config.model_config.max_model_len)
    if vllm_config.load_config.load_format != "dummy":
        # A damaged checkpoint ends the start here, not in a worker.
        checkpoint.validate()


def prefer_backend(args: "EngineArgs") -> None:
    """Names a backend where vLLM would choose FlashInfer, which has no tree form; a named one stays."""
    config = args.attention_config
    named = args.attention_backend or config.backend or "auto"
    if str(named).lower() != "auto" or config.backend_per_kind:
        return
    if not current_platform.is_cuda():
        return
    hopper, blackwell = map(current_platform.is_device_capability_family, (90, 100))
    # vLLM's order of backends differs on data-centre Blackwell; and FlashAttention reads quantised caches
    # there and on Hopper only.
    quantised = args.kv_cache_dtype in QUANTISED_CACHES
    if quantised and not (hopper or blackwell):
        args.attention_backend = AttentionBackendEnum.TRITON_ATTN
    elif blackwell:
        args.attention_backend = AttentionBackendEnum.FLASH_ATTN
    else:
        return
    name = args.attention_backend.name
    logger.info("griffin: attention backend %s, since FLASHINFER has no tree form", name)


def warn_of_rows(vllm_config: VllmConfig) -> None:
    """Warns if a step cannot verify the trees of as many requests as may run at once."""
    spec, scheduler = griffin_config(vllm_config), vllm_config.scheduler_config
    # Sizes by batch size are the user's, or timed.
    if spec is None or spec.num_speculative_tokens_per_batch_size is not None:
        return
    rows, most = 1 + spec.num_speculative_tokens, scheduler.max_num_batched_tokens
    if scheduler.max_num_seqs * rows > most:
        logger.warning(
            "griffin: a step of max_num_batched_tokens=%d holds the trees of %d requests (1 + "
            "num_speculative_tokens=%d rows each), and max_num_seqs=%d may run: the others wait. "
            "Lower max_num_seqs%s",
            *(most, most // rows, spec.num_speculative_tokens, scheduler.max_num_seqs),
            ""
            if spec.tree_budget
            else ", or give larger batches smaller trees by num_speculative_tokens_per_batch_size",
        )


def _check_timing(vllm_config: VllmConfig, spec: GriffinSpeculativeConfig) -> None:
    """Steps can be timed only where they fit into the context."""
    if not spec.adaptive:
        return
    from vllm_griffin.cost import context_needed

    scheduler = vllm_config.scheduler_config
    needed = context_needed(
        *(spec.tree_levels, spec.num_speculative_tokens),
        *(scheduler.max_num_seqs, scheduler.max_num_batched_tokens),
    )
    found = vllm_config.model_config.max_model_len
    if found < needed:
        raise ValueError(
            "num_speculative_tokens_per_batch_size='auto', which a draft with tree_acceptance turns on, "
            f"times steps of up to {needed} tokens, and max_model_len is {found}: name "
            "num_speculative_tokens instead"
        )


def _engine_features(vllm_config: VllmConfig) -> list[tuple[str, bool, str]]:
    """(feature, whether this engine has it, what to do) for all that is refused."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    offload, text = vllm_config.offload_config, model.hf_text_config
    return [
        ("Model Runner V1", not vllm_config.use_v2_model_runner, _runner_advice()),
        ("pipeline parallelism", parallel.pipeline_parallel_size > 1, "use tensor parallelism"),
        ("data parallelism", parallel.data_parallel_size > 1, "start one engine per replica"),
        (
            "decode context parallelism",
            parallel.decode_context_parallel_size > 1,
            "set decode_context_parallel_size=1",
        ),
        (
            "prefill context parallelism",
            parallel.prefill_context_parallel_size > 1,
            "set prefill_context_parallel_size=1",
        ),
        (
            "dual batch overlap",
            parallel.use_ubatching,
            "leave enable_dbo and ubatch_size off",
        ),
        (
            "expert parallelism",
            parallel.enable_expert_parallel or parallel.enable_eplb,
            "leave enable_expert_parallel and enable_eplb off; tensor parallelism splits experts too",
        ),
        (
            "batch-sharded sampling",
            bool(parallel.enable_batch_sharded_sampling),
            "leave enable_batch_sharded_sampling off",
        ),
        ("LoRA", vllm_config.lora_config is not None, "merge the adapter into the target"),
        (
            "KV connectors and offloading",
            vllm_config.kv_transfer_config is not None,
            "leave kv_transfer_config and KV offloading out",
        ),
        (
            "weight transfer from a trainer",
            vllm_config.weight_transfer_config is not None,
            "leave weight_transfer_config out and call reload_weights",
        ),
        (
            "weight offloading",
            bool(offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size),
            "leave cpu_offload_gb and offload_group_size at 0",
        ),
        ("sleep mode", bool(model.enable_sleep_mode), "leave enable_sleep_mode off"),
        (
            "routed-experts output",
            vllm_config.aux_output_config.enabled,
            "leave enable_return_routed_experts off",
        ),
        (
            "batch-invariant mode",
            bool(envs.VLLM_BATCH_INVARIANT),
            "unset VLLM_BATCH_INVARIANT; a tree's rows go through another kernel than plain rows",
        ),
        (
            f"kv_cache_dtype={cache.cache_dtype!r}",
            cache.cache_dtype not in ("auto", _dtype_name(model), *QUANTISED_CACHES),
            # "auto" may have been resolved to what a quantised checkpoint asks for.
            f"set kv_cache_dtype={_dtype_name(model)!r} or {QUANTISED_CACHES[0]!r}",
        ),
        (
            "layers whose KV cache has another dtype",
            bool(cache.kv_cache_dtype_skip_layers),
            "leave kv_cache_dtype_skip_layers empty",
        ),
        (
            "KV-sharing fast prefill",
            bool(cache.kv_sharing_fast_prefill),
            "leave kv_sharing_fast_prefill off",
        ),
        ("sliding-window attention", _has_sliding_window(model), "use a full-attention target"),
        (
            "chunked local attention",
            bool(getattr(text, "attention_chunk_size", None)),
            "use a full-attention target",
        ),
        ("multi-head latent attention", bool(model.use_mla), "use a target with MHA or GQA"),
        (
            "multimodal targets",
            bool(model.supports_multimodal_inputs),
            "use a text-only target",
        ),
        (
            "hybrid or attention-free targets",
            bool(model.is_hybrid or model.is_attention_free),
            "use a full-attention target",
        ),
        ("M-RoPE", bool(model.uses_mrope), "use a target with 1-D positions"),
        ("prompt embeddings", bool(model.enable_prompt_embeds), "leave enable_prompt_embeds off"),
        ("encoder-decoder targets", bool(model.is_encoder_decoder), "use a decoder-only target"),
        ("pooling", model.runner_type != "generate", "use runner='generate'"),
        (
            "sampling masks",
            bool(model.return_sampling_mask),
            "leave return_sampling_mask off",
        ),
        (
            "trace replay",
            bool(model.enable_trace_replay),
            "leave enable_trace_replay off",
        ),
        (
            "watermarking",
            vllm_config.watermark_config is not None,
            "leave watermark_config out",
        ),
        (
            "ALiBi or logit soft-capping",
            bool(getattr(text, "alibi", False) or getattr(text, "attn_logit_softcapping", None)),
            "use a target without them",
        ),
        (
            "max_num_batched_tokens below 1 + num_speculative_tokens",
            scheduler.max_num_batched_tokens < 1 + vllm_config.num_speculative_tokens,
            "raise max_num_batched_tokens or draft a smaller tree",
        ),
    ]


def _dtype_name(model: ModelConfig) -> str:
    return str(model.dtype).removeprefix("torch.")


def _has_sliding_window(model: ModelConfig) -> bool:
    return model.get_sliding_window() is not None


def _runner_advice() -> str:
    return (
        "it needs Model Runner V2; on a CPU set VLLM_GRIFFIN_CPU=1, elsewhere unset "
        "VLLM_USE_V2_MODEL_RUNNER"
    )
