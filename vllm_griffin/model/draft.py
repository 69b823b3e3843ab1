"""The draft model that vLLM runs: GRIFFIN, its ablations, and plain EAGLE drafts.

Slot t holds the pair (feature f_t of the target after its final norm, token x_{t+1}), has RoPE
position t, and predicts x_{t+2} (through `predict` and the target's LM head) and the next slot's
feature (`regress`).

Legend of shapes: T tokens, h hidden size, V vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.vllm import set_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.utils import (
    get_draft_load_config,
    process_weights_after_loading,
)
from vllm.model_executor.model_loader.weight_utils import (
    default_weight_loader,
    initialize_single_dummy_weight,
)
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_griffin.config import griffin_config
from vllm_griffin.model.checkpoint import CheckpointError, DraftCheckpoint
from vllm_griffin.model.int8 import Int8LinearMethod
from vllm_griffin.model.layers import DraftLayer, PlainFusion, TokenGuidedFusion
from vllm_griffin.model.layout import expected_shapes
from vllm_griffin.model.level import TreeLevel
from vllm_griffin.model.target import shared_modules

logger = init_logger("vllm.griffin.draft")

PREFIX = "griffin_draft"
# Unit vectors through the target's LM head at a time: each gives a row as wide as the vocabulary.
UNIT_ROWS = 256
# Checkpoint module -> ours for the left and the right half of its input; the left one has the bias.
PAIRS = {module: (f"{module}.token", f"{module}.feature") for module in ("fc", "fc.fc")}
# Checkpoint module -> (vLLM's stacked module, shard of it).
STACKED: dict[str, tuple[str, str | int]] = {
    "layers.0.self_attn.q_proj": ("layers.0.self_attn.qkv_proj", "q"),
    "layers.0.self_attn.k_proj": ("layers.0.self_attn.qkv_proj", "k"),
    "layers.0.self_attn.v_proj": ("layers.0.self_attn.qkv_proj", "v"),
    "layers.0.mlp.gate_proj": ("layers.0.mlp.gate_up_proj", 0),
    "layers.0.mlp.up_proj": ("layers.0.mlp.gate_up_proj", 1),
}


class GriffinDraftModel(nn.Module):
    """One decoder layer over fused (embedding, feature) pairs; head and embedding are the target's.

    Attributes:
        config: Shape of the network.
        layout: Which variant it is.
        embed_tokens: The draft's own embedding, or the target's after `share_with_target`.
        lm_head: The target's, after `share_with_target`; part of it, after `draft_from`.
        num_kv_heads: Key and value heads of this rank.
        head_dim: Size of one head.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        checkpoint: DraftCheckpoint | None = None,
    ) -> None:
        """Build the network, without weights.

        Args:
            vllm_config: The engine's; `speculative_config.draft_model_config` says which draft.
            checkpoint: The draft's, opened here if None.

        Raises:
            CheckpointError: The draft's config or files cannot be used.
            ValueError: The draft cannot be split over the ranks.
        """
        super().__init__()
        checkpoint = checkpoint or open_draft(vllm_config)
        self.config, self.layout = checkpoint.config, checkpoint.layout
        self.config.check_ranks(get_tensor_model_parallel_world_size())
        self.embed_tokens: nn.Module | None = None
        if self.layout.own_embedding:
            self.embed_tokens = VocabParallelEmbedding(
                self.config.vocab_size, self.config.hidden_size, prefix=f"{PREFIX}.embed_tokens"
            )
        self.fc = (
            TokenGuidedFusion(self.config, f"{PREFIX}.fc")
            if self.layout.fusion
            else PlainFusion(self.config, self.layout.fc_bias, f"{PREFIX}.fc")
        )
        # vLLM reads a layer's number off its name, and it must not be one of the target's.
        number = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        layer = DraftLayer(
            self.config,
            self.layout,
            vllm_config.cache_config,
            vllm_config.model_config.max_model_len,
            f"{PREFIX}.layers.{number}",
        )
        self.layers = nn.ModuleList([layer])
        self.num_kv_heads = layer.self_attn.num_kv_heads
        self.head_dim = layer.self_attn.head_dim
        self.lm_head: nn.Module | None = None
        # The draft's own part of it, made once: a captured CUDA graph reads it where it lies.
        self.reduced_head: nn.Module | None = None
        # Of linear layers and `reduced_head`; a head that is the target's stays as it is.
        self.int8 = False
        # [V_d] int64, ascending; None: the whole vocabulary
        self.draft_tokens: Tensor | None = None
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        level: TreeLevel | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the draft over T slots.

        Args:
            input_ids: [T] int, the token after each feature.
            positions: [T] int64, RoPE position of each slot (that of the feature).
            hidden_states: [T, h] features: the target's after its final norm, or earlier `regress`.
            level: Tree rows read their prefix from the paged cache and their tail from its scratch;
                None is the ordinary causal pass, whose keys go into the paged cache.

        Returns:
            (predict, regress), each [T, h]: the first is for `compute_logits`, the second is the
            feature of the next slot. Without a second head both are the same tensor.
        """
        assert self.embed_tokens is not None, "share_with_target comes first"
        fused = self.fc.fuse(self.embed_tokens(input_ids), hidden_states)
        return self.layers[0](positions, fused, level)

    def compute_logits(self, predict: Tensor) -> Tensor | None:
        """[T, h] -> [T, V] through the LM head; None where vLLM gathers no logits.

        With a reduced vocabulary [T, V_d]; `target_tokens` tells which tokens they are.
        """
        bias = getattr(self.lm_head, "bias", None)
        return self.logits_processor(self.lm_head, predict, bias)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a whole checkpoint; keys and shapes are those of `expected_shapes`.

        Each parameter's own loader takes this rank's part.

        Returns:
            The keys that were loaded.

        Raises:
            CheckpointError: A key is unknown or missing.
        """
        params = dict(self.named_parameters())
        loaded: set[str] = set()
        for key, weight in weights:
            module, _, leaf = key.rpartition(".")
            stacked, *shard = STACKED.get(module, (module,))
            halves = PAIRS.get(module, (stacked,))
            parts = weight.chunk(len(halves), dim=-1) if leaf == "weight" else (weight,)
            for name, part in zip(halves, parts, strict=False):
                param = params.get(f"{name}.{leaf}")
                if param is None:
                    raise CheckpointError(f"{self.config.source}: unexpected key `{key}`")
                loader = getattr(param, "weight_loader", default_weight_loader)
                loader(param, part, *shard)
            loaded.add(key)
        missing = expected_shapes(self.config, self.layout).keys() - loaded
        if missing:
            raise CheckpointError(f"{self.config.source}: missing key `{min(missing)}`")
        return loaded

    def use_int8(self) -> None:
        """Have linear layers multiplied in 8 bits (`vllm_griffin.model.int8`); before weights are loaded."""
        self.int8 = True
        pair = self.fc.fc if isinstance(self.fc, TokenGuidedFusion) else self.fc
        for module in self.modules():
            if isinstance(module, LinearBase) and module not in (pair.token, pair.feature):
                module.quant_method = Int8LinearMethod()

    def share_with_target(self, target_model: nn.Module) -> None:
        """Take the target's LM head, and its embedding unless the draft brings a different one.

        A copy of the target's embedding is dropped. Under tensor parallelism each rank compares its
        own rows; where ranks decide differently the tokens still get the same vectors.

        Raises:
            TargetError: The target model has no such modules.
        """
        parts = shared_modules(target_model)
        self.lm_head = parts.lm_head
        self.logits_processor.scale = parts.logit_scale
        self.logits_processor.soft_cap = parts.logit_soft_cap
        if self.embed_tokens is None or _same_weight(self.embed_tokens, parts.embedding):
            self.embed_tokens = parts.embedding
        else:
            logger.info("griffin: the draft keeps its own embedding, the target's differs")

    def draft_from(self, tokens: list[int]) -> None:
        """Give the draft an LM head of its own, the target's rows of `tokens`."""
        bias = getattr(self.lm_head, "bias", None)
        self.reduced_head = ParallelLMHead(
            len(tokens), self.config.hidden_size, bias=bias is not None
        )
        if self.int8:
            # `refresh_head` writes its rows again.
            self.reduced_head.quant_method = Int8LinearMethod(keep_weight=True)
        self.draft_tokens = torch.tensor(tokens)
        self.refresh_head()

    def refresh_head(self) -> None:
        """Copy the rows of `draft_tokens` from the target's head, that `share_with_target` has given.

        The rows are read off the head's outputs, since it may keep its weight packed or quantised.
        Ranks have other parts of this head than of the target's, so all see all of its outputs.
        """
        source: Any = self.lm_head
        head: Any = self.reduced_head
        ids = self.draft_tokens
        assert source is not None and ids is not None, "share_with_target, draft_from come first"
        bias = getattr(source, "bias", None)
        dtype = next(self.layers.parameters()).dtype
        part = head.shard_indices
        own = ids[part.org_vocab_start_index : part.org_vocab_end_index]
        with torch.inference_mode():
            for units in torch.eye(self.config.hidden_size, dtype=dtype).split(UNIT_ROWS):
                columns = units.any(0)
                logits = tensor_model_parallel_all_gather(source.quant_method.apply(source, units))
                head.weight[: len(own), columns] = logits[:, own].T.to(head.weight.dtype)
            if bias is not None:
                head.bias[: len(own)] = tensor_model_parallel_all_gather(bias)[own]
        head.quant_method.process_weights_after_loading(head)
        self.lm_head = head
        whole = self.logits_processor
        self.logits_processor = LogitsProcessor(
            len(ids), scale=whole.scale, soft_cap=whole.soft_cap
        )
        if self.int8:
            processor: Any = self.logits_processor
            # Another dtype would have it multiply the weight that is kept.
            processor.head_dtype = None

    def target_tokens(self, rows: Tensor) -> Tensor:
        """Token ids of rows of the logits, int64 as they are."""
        return rows if self.draft_tokens is None else self.draft_tokens[rows]


def _same_weight(own: nn.Module, shared: nn.Module) -> bool:
    """Bit for bit; a quantised embedding has no comparable weight and so differs."""
    a, b = own.weight, getattr(shared, "weight", None)
    assert isinstance(a, Tensor)
    return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)


def load_draft_model(target_model: nn.Module, vllm_config: VllmConfig) -> GriffinDraftModel:
    """Build the draft on the engine's device, load its checkpoint, share the target's modules.

    With `load_format="dummy"` the weights are small random numbers, and the checkpoint needs only a
    `config.json`.

    Raises:
        CheckpointError: The checkpoint is damaged, or does not fit its layout or the target.
        TargetError: The target model has nothing to share.
        ValueError: The draft cannot be split over the ranks.
    """
    checkpoint = open_draft(vllm_config)
    target = vllm_config.model_config
    checkpoint.check_target(target.get_hidden_size(), target.get_vocab_size())
    load_config = get_draft_load_config(vllm_config)
    dummy = load_config.load_format == "dummy"
    if not dummy:
        checkpoint.validate()
    device = torch.device(load_config.device or current_platform.device_type)
    # Features, LM head and KV cache are the target's, so its dtype is the draft's.
    assert isinstance(target.dtype, torch.dtype)
    with set_default_torch_dtype(target.dtype):
        with device, set_current_vllm_config(vllm_config, prefix=PREFIX):
            draft = GriffinDraftModel(vllm_config=vllm_config, checkpoint=checkpoint)
        griffin = griffin_config(vllm_config)
        if griffin is not None and griffin.draft_quantization == "int8":
            draft.use_int8()
        if dummy:
            for param in draft.parameters():
                initialize_single_dummy_weight(param)
        else:
            draft.load_weights(checkpoint.weights())
        process_weights_after_loading(draft, _draft_model_config(vllm_config), device)
    vocabulary = checkpoint.vocabulary(griffin.draft_vocab_size if griffin else None)
    if vocabulary is not None:
        logger.info("griffin: drafting from the %d most frequent tokens", len(vocabulary))
    connect_draft(draft, target_model, vllm_config, vocabulary)
    bits = ", in 8 bits" if draft.int8 else ""
    logger.info(
        "griffin: loaded a %s draft from %s%s", checkpoint.layout.name, checkpoint.folder, bits
    )
    return draft.eval()


def connect_draft(
    draft: GriffinDraftModel,
    target_model: nn.Module,
    vllm_config: VllmConfig,
    vocabulary: list[int] | None = None,
) -> None:
    """Share the target's modules with the draft, and copy the head's rows of `vocabulary` if given.

    To be repeated, without `vocabulary`, when the target's weights have changed, since a copy does not
    follow them.
    """
    draft.share_with_target(target_model)
    if vocabulary is None and draft.draft_tokens is None:
        return
    device = next(draft.layers.parameters()).device
    dtype = vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype)
    with set_default_torch_dtype(dtype), device, set_current_vllm_config(vllm_config):
        if vocabulary is None:
            draft.refresh_head()
        else:
            draft.draft_from(vocabulary)


def open_draft(vllm_config: VllmConfig) -> DraftCheckpoint:
    """Open the checkpoint of an engine's draft, whose folder the speculative config has found.

    Raises:
        CheckpointError: See `DraftCheckpoint.open`.
    """
    return DraftCheckpoint.open(_draft_model_config(vllm_config).model)


def _draft_model_config(vllm_config: VllmConfig) -> ModelConfig:
    assert vllm_config.speculative_config is not None
    return vllm_config.speculative_config.draft_model_config
