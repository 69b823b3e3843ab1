"""The speculative config of griffin: its fields, their defaults, and every refusal.

Outside, the method is called ``griffin``. Inside, the config says ``eagle``, because that is what a
dozen lists in vLLM test for (prefix-cache block drop, look-ahead slots, async scheduling): a subclass
which is an EAGLE-type method to all of them needs no further patch.
"""

import dataclasses
from typing import Any

from pydantic import Field
from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from vllm_griffin.compat import install_engine_patches
from vllm_griffin.model.checkpoint import DraftCheckpoint
from vllm_griffin.model.config import PAPER_TREE, max_tree_nodes

logger = init_logger(__name__)

METHOD = "griffin"

# Fields of vLLM's SpeculativeConfig that griffin does not honour: what to do instead.
REFUSED_FIELDS: dict[str, str] = {
    "enforce_eager": "set enforce_eager for the whole engine",
    "tensor_parallel_size": "leave it out; the draft runs on the target's ranks",
    "quantization": "leave it out; the draft runs in the target's dtype",
    "moe_backend": "leave it out; the draft has no experts",
    "attention_backend": "leave it out; the draft uses the target's attention backend",
    "kv_cache_dtype": "leave it out; the draft's KV cache has the target's dtype",
    "max_model_len": "leave it out; the draft serves the target's context length",
    "code_revision": "leave it out; a draft checkpoint carries no code",
    "index_share_for_mtp_iteration": "leave it out; it belongs to method 'mtp'",
    "disable_padded_drafter_batch": "leave it out; tree shapes are constant",
    "use_local_argmax_reduction": "leave it out; a tree needs the top-k of the full vocabulary",
    "use_heterogeneous_vocab": "leave it out; draft and target share one vocabulary",
    "prompt_lookup_max": "leave it out; it belongs to method 'ngram'",
    "prompt_lookup_min": "leave it out; it belongs to method 'ngram'",
    "parallel_drafting": "leave it out; griffin drafts level by level",
    "suffix_decoding_max_tree_depth": "use tree_depth; it belongs to method 'suffix'",
    "suffix_decoding_max_cached_requests": "leave it out; it belongs to method 'suffix'",
    "suffix_decoding_max_spec_factor": "leave it out; it belongs to method 'suffix'",
    "suffix_decoding_min_token_prob": "leave it out; it belongs to method 'suffix'",
    "draft_load_config": "leave it out; the draft is read by its own loader",
    "rejection_sample_method": "leave it at 'standard'; tree verification is always exact",
    "synthetic_acceptance_rates": "leave it out; acceptance is never forced",
    "synthetic_acceptance_length": "leave it out; acceptance is never forced",
    "enable_adaptive_verification": "leave it out; it belongs to method 'dspark'",
    "draft_sample_method": "leave it at 'greedy'; the tree holds the draft's best nodes",
    "dspark_draft_topk": "use tree_top_k; it belongs to method 'dspark'",
}


@config
class GriffinSpeculativeConfig(SpeculativeConfig):
    """``speculative_config`` of an engine that drafts GRIFFIN trees.

    Raises:
        ValueError: a field that griffin does not honour, a tree that cannot be made, or a draft
            checkpoint that does not fit the target.
    """

    method: str | None = METHOD  # type: ignore[assignment]
    tree_depth: int | None = Field(default=None, gt=0)
    """Levels of drafted tokens (D). Default: the draft's config, else 6."""
    tree_top_k: int | None = Field(default=None, gt=0)
    """Frontier width and children per node (K); 1 is a chain. Default: the draft's config, else 10."""
    draft_vocab_size: int | None = Field(default=None, gt=0)
    """Draft from so many tokens only, the most frequent of the draft's training data, as its
    ``vocabulary.json`` ranks them. Default: the draft's config, else the whole vocabulary."""

    def __post_init__(self) -> None:
        """Resolves the tree and the draft's model config, or refuses by name."""
        self._refuse_fields()
        if not self.model:
            raise ValueError(
                "speculative_config needs 'model' for method 'griffin': "
                "the draft's folder or hub id"
            )
        checkpoint = DraftCheckpoint.open(self.model, revision=self.revision)
        self._resolve_tree(checkpoint)
        self._check_sizes()
        target = self.target_model_config
        checkpoint.check_target(target.get_hidden_size(), target.get_vocab_size())
        if checkpoint.has_weights:
            # A damaged checkpoint ends the start here, not in a worker. Without weights only
            # load_format='dummy' can go on, which the worker checks.
            checkpoint.validate()
        self._resolve_vocabulary(checkpoint)
        self.method = "eagle"
        install_engine_patches()
        self.draft_tensor_parallel_size = self._same_tensor_parallel_size()
        self.draft_model_config = self._make_draft_model_config(str(checkpoint.folder))
        self.draft_parallel_config = SpeculativeConfig.create_draft_parallel_config(
            self.target_parallel_config,
            self.draft_tensor_parallel_size,
            draft_model_config=self.draft_model_config,
        )

    def _refuse_fields(self) -> None:
        if self.method != METHOD:
            raise ValueError(f"GriffinSpeculativeConfig is for method '{METHOD}' only")
        for field in dataclasses.fields(SpeculativeConfig):
            if field.name not in REFUSED_FIELDS:
                continue
            default = getattr(field.default, "default", field.default)
            value = getattr(self, field.name)
            if value != default:
                raise ValueError(
                    f"speculative_config['{field.name}']={value!r} is not supported with method "
                    f"'griffin': {REFUSED_FIELDS[field.name]}"
                )

    def _resolve_tree(self, checkpoint: DraftCheckpoint) -> None:
        defaults = PAPER_TREE | checkpoint.tree_defaults()
        chosen_shape = self.tree_depth is not None or self.tree_top_k is not None
        self.tree_depth = self.tree_depth or defaults["tree_depth"]
        self.tree_top_k = self.tree_top_k or defaults["tree_top_k"]
        most = max_tree_nodes(self.tree_depth, self.tree_top_k)
        if self.num_speculative_tokens is None:
            # Who asks for a smaller shape only and names no size gets the nodes it can make.
            wanted = defaults["num_speculative_tokens"]
            self.num_speculative_tokens = min(wanted, most) if chosen_shape else wanted
        if self.num_speculative_tokens > most:
            raise ValueError(
                f"num_speculative_tokens={self.num_speculative_tokens} is above the {most} nodes "
                f"that tree_depth={self.tree_depth} and tree_top_k={self.tree_top_k} can make "
                f"(K + (D - 1) * K * K)"
            )

    def _check_sizes(self) -> None:
        """The schedule of tree sizes by batch size, in vLLM's own form."""
        if self.num_speculative_tokens_per_batch_size is None:
            return
        schedule = validate_and_normalize_dynamic_sd_schedule(
            self.num_speculative_tokens_per_batch_size
        )
        most = max(nodes for _, _, nodes in schedule)
        if most > self.num_speculative_tokens:
            raise ValueError(
                f"num_speculative_tokens_per_batch_size asks for {most} nodes, "
                f"num_speculative_tokens={self.num_speculative_tokens} is the most"
            )

    def _resolve_vocabulary(self, checkpoint: DraftCheckpoint) -> None:
        vocabulary = checkpoint.vocabulary(self.draft_vocab_size)
        whole = self.target_model_config.get_vocab_size()
        self.draft_vocab_size = whole if vocabulary is None else len(vocabulary)
        if self.tree_top_k is not None and self.tree_top_k > self.draft_vocab_size:
            raise ValueError(
                f"tree_top_k={self.tree_top_k} is above the vocabulary of "
                f"{self.draft_vocab_size} tokens"
            )

    def _same_tensor_parallel_size(self) -> int:
        size = self.target_parallel_config.tensor_parallel_size
        if self.draft_tensor_parallel_size not in (None, size):
            raise ValueError(
                f"speculative_config['draft_tensor_parallel_size']="
                f"{self.draft_tensor_parallel_size} is not supported with method 'griffin': leave "
                f"it out or set it to the target's tensor_parallel_size={size}"
            )
        return size

    def _make_draft_model_config(self, folder: str) -> ModelConfig:
        target = self.target_model_config
        draft = ModelConfig(
            model=folder,
            runner="draft",
            tokenizer=target.tokenizer,
            tokenizer_mode=target.tokenizer_mode,
            tokenizer_revision=target.tokenizer_revision,
            dtype=target.dtype,
            seed=target.seed,
            enforce_eager=target.enforce_eager,
            max_logprobs=target.max_logprobs,
            spec_target_max_model_len=target.max_model_len,
            hf_overrides=_name_draft_architecture,
        )
        # A draft serves the target's positions, whatever context its checkpoint names (vllm#48894).
        SpeculativeConfig._maybe_override_draft_max_position_embeddings(
            draft.hf_config, target.max_model_len
        )
        draft.max_model_len = target.max_model_len
        return draft

    def __setstate__(self, state: dict[str, Any]) -> None:
        """An engine-core or worker process learns here that its engine asked for griffin."""
        self.__dict__.update(state)
        install_engine_patches()

    @property
    def tree_levels(self) -> int:
        """Levels that can hold a selected node: a tree of N nodes is at most N deep."""
        assert self.tree_depth is not None
        return min(self.tree_depth, self.num_speculative_tokens)

    def __repr__(self) -> str:
        """Shows what the user asked for, in the engine's start-up line."""
        return (
            f"SpeculativeConfig(method='{METHOD}', model={self.draft_model_config.model!r}, "
            f"num_spec_tokens={self.num_speculative_tokens}, tree_depth={self.tree_depth}, "
            f"tree_top_k={self.tree_top_k})"
        )


def _name_draft_architecture(hf_config: Any) -> Any:
    """Published drafts name no architecture, or one that vLLM does not know.

    vLLM asks this class only for facts that a Llama shares (text in, tokens out, no pooling); the
    network itself is built by ``vllm_griffin.model.draft``.
    """
    hf_config.architectures = ["LlamaForCausalLM"]
    return hf_config


def griffin_config(vllm_config: VllmConfig | None) -> GriffinSpeculativeConfig | None:
    """The griffin part of an engine's config, or None if it did not ask for griffin."""
    if vllm_config is None:
        return None
    speculative = vllm_config.speculative_config
    return speculative if isinstance(speculative, GriffinSpeculativeConfig) else None


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuses engine features that griffin does not support yet.

    Raises:
        ValueError: names the feature and what to do.
    """
    for feature, present, advice in _engine_features(vllm_config):
        if present:
            raise ValueError(f"method 'griffin' does not support {feature}: {advice}")


def _engine_features(vllm_config: VllmConfig) -> list[tuple[str, bool, str]]:
    """(feature, whether this engine has it, what to do) for all that is refused."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    text = model.hf_text_config
    return [
        ("Model Runner V1", not vllm_config.use_v2_model_runner, _runner_advice()),
        ("pipeline parallelism", parallel.pipeline_parallel_size > 1, "use tensor parallelism"),
        ("tensor parallelism", parallel.tensor_parallel_size > 1, "use one rank"),
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
        ("dual batch overlap", bool(parallel.enable_dbo), "leave enable_dbo off"),
        (
            "batch-sharded sampling",
            bool(getattr(parallel, "enable_batch_sharded_sampling", False)),
            "leave enable_batch_sharded_sampling off",
        ),
        ("LoRA", vllm_config.lora_config is not None, "merge the adapter into the target"),
        (
            "KV connectors and offloading",
            vllm_config.kv_transfer_config is not None,
            "leave kv_transfer_config and KV offloading out",
        ),
        (
            f"kv_cache_dtype={cache.cache_dtype!r}",
            cache.cache_dtype not in ("auto", "float16", "bfloat16"),
            "use kv_cache_dtype='auto'",
        ),
        (
            "KV-sharing fast prefill",
            bool(cache.kv_sharing_fast_prefill),
            "leave kv_sharing_fast_prefill off",
        ),
        ("sliding-window attention", _has_sliding_window(model), "use a full-attention target"),
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
        ("M-RoPE", bool(getattr(model, "uses_mrope", False)), "use a target with 1-D positions"),
        ("prompt embeddings", bool(model.enable_prompt_embeds), "leave enable_prompt_embeds off"),
        ("encoder-decoder targets", bool(model.is_encoder_decoder), "use a decoder-only target"),
        ("pooling", model.runner_type != "generate", "use runner='generate'"),
        (
            "sampling masks",
            bool(getattr(model, "return_sampling_mask", False)),
            "leave return_sampling_mask off",
        ),
        (
            "trace replay",
            bool(getattr(model, "enable_trace_replay", False)),
            "leave enable_trace_replay off",
        ),
        (
            "watermarking",
            getattr(vllm_config, "watermark_config", None) is not None,
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


def _has_sliding_window(model: ModelConfig) -> bool:
    return model.get_sliding_window() is not None


def _runner_advice() -> str:
    return (
        "it needs Model Runner V2; on a CPU set VLLM_GRIFFIN_CPU=1, elsewhere unset "
        "VLLM_USE_V2_MODEL_RUNNER"
    )
