"""The speculative config of griffin: its fields, their defaults, and every refusal.

Outside, the method is called ``griffin``. Inside, the config says ``eagle``, because that is what a
dozen lists in vLLM test for (prefix-cache block drop, look-ahead slots, async scheduling): a subclass
which is an EAGLE-type method to all of them needs no further patch.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, ValidationError
from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from vllm_griffin.compat import install_engine_patches
from vllm_griffin.config_errors import SCHEDULE, first_line, sentence, unknown_field
from vllm_griffin.model.checkpoint import DraftCheckpoint
from vllm_griffin.model.config import PAPER_TREE, tree_acceptance
from vllm_griffin.tree_shape import TreeShape, max_tree_nodes

logger = init_logger("vllm.griffin.config")

METHOD = "griffin"
# KV caches of 8-bit floats, with a scale a layer or a key head, that trees can be read from.
QUANTISED_CACHES = ("fp8", "fp8_e4m3")
# Strict: `true` is no 1 and "12" is no 12.
Whole = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(gt=0, strict=True)]
SizesByBatch: TypeAlias = list[tuple[Whole, Whole, Whole]] | Literal["auto"]

# Fields of vLLM's SpeculativeConfig that griffin does not honour: what to do instead.
REFUSED_FIELDS: dict[str, str] = {
    "enforce_eager": "set enforce_eager for the whole engine",
    "tensor_parallel_size": "leave it out; the draft runs on the target's ranks",
    "quantization": "leave it out; on a CPU, draft_quantization has the draft in 8 bits",
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
    "enable_adaptive_verification": "leave it out; it belongs to method 'dspark'",
    "draft_sample_method": "leave it at 'greedy'; the tree holds the draft's best nodes",
    "dspark_draft_topk": "use tree_top_k; it belongs to method 'dspark'",
}
# Fields that the engine sets, not its user.
SET_BY_VLLM = (
    "target_model_config",
    "target_parallel_config",
    "draft_model_config",
    "draft_parallel_config",
    "download_dir",
)


@config
class GriffinSpeculativeConfig(SpeculativeConfig):
    """``speculative_config`` of an engine that drafts GRIFFIN trees.

    Raises:
        ValueError: a field that griffin does not honour, a tree that cannot be made, or a draft
            checkpoint that does not fit the target.
    """

    method: str | None = METHOD  # type: ignore[assignment]
    num_speculative_tokens: Count = None  # type: ignore[assignment]
    """Drafted nodes verified per step (N), the root not counted."""
    num_speculative_tokens_per_batch_size: SizesByBatch | None = None  # type: ignore[assignment]
    """Smaller trees for larger batches: (first batch size, last, nodes). Or "auto": the tree that pays most
    on this machine, by steps timed at start-up, none where none pays; this is the default of a draft with
    `tree_acceptance` if no other field names a tree."""
    draft_tensor_parallel_size: Count | None = None
    """The target's, or left out."""
    tree_depth: Count | None = None
    """Levels of drafted tokens (D). Default: the draft's config, else 6."""
    tree_top_k: Count | None = None
    """Frontier width and children per node (K); 1 is a chain. Default: the draft's config, else 10."""
    draft_vocab_size: Count | None = None
    """Draft from so many tokens only, the most frequent of the draft's training data, as its
    ``vocabulary.json`` ranks them. Default: the draft's config, else the whole vocabulary."""

    draft_quantization: Literal["int8"] | None = None
    """Multiply the draft's weights as 8-bit integers, but those of the layer that takes features and of
    a head that is the target's: on CPUs only, where reading weights is much of a draft step. The target
    stays as it is, and so do outputs. Default: the target's dtype."""

    tree_budget: Count | None = None
    """Nodes that a request verifies on average, below `num_speculative_tokens`, which is then the most that
    one can get: a step of B requests verifies the B * `tree_budget` nodes of all their trees that are the
    likeliest to be accepted. Default: every request verifies its whole tree."""

    tree_acceptance: dict[str, float] | None = None
    """Acceptance length of this draft by tree, ``{"nodes,depth,top_k": length}``: what "auto" chooses from.
    Default: the draft's config, where ``vllm-griffin eval --write-trees`` puts it."""

    download_dir: str | None = None
    """Where the engine puts what it downloads; the hub's own cache if None."""

    def __post_init__(self) -> None:
        """Resolves the tree and the draft's model config, or refuses by name."""
        self._refuse_fields()
        checkpoint = self._open_draft()
        self.trees = self._resolve_trees(checkpoint)
        self._check_sizes()
        self._check_budget()
        self._check_quantization()
        self._resolve_rejection()
        target = self.target_model_config
        checkpoint.check_target(target.get_hidden_size(), target.get_vocab_size())
        checkpoint.config.check_ranks(self.target_parallel_config.tensor_parallel_size)
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
                raise ValueError(_refusal(field.name, value))

    def _open_draft(self) -> DraftCheckpoint:
        if not self.model:
            raise ValueError(
                "speculative_config needs 'model' for method 'griffin': "
                "the draft's folder or hub id"
            )
        if self.revision is not None and Path(self.model).expanduser().is_dir():
            raise ValueError(
                f"speculative_config['revision']={self.revision!r} is of a hub id, and 'model' is a "
                f"folder: leave it out"
            )
        return DraftCheckpoint.open(self.model, self.revision, self.download_dir)

    def _resolve_trees(self, checkpoint: DraftCheckpoint) -> list[TreeShape]:
        """Sets N, D and K. Returns the trees that may be drafted."""
        named = [self.num_speculative_tokens, self.tree_depth, self.tree_top_k]
        if self.tree_acceptance is None:
            self.tree_acceptance = checkpoint.tree_acceptance()
        else:
            tree_acceptance({"tree_acceptance": self.tree_acceptance}, "speculative_config")
        unnamed = not any([*named, self.num_speculative_tokens_per_batch_size])
        self.adaptive = self.num_speculative_tokens_per_batch_size == "auto" or (
            unnamed and bool(self.tree_acceptance)
        )
        if self.adaptive:
            return self._resolve_candidates()
        self._resolve_tree(checkpoint)
        tree = {name: getattr(self, name) for name in PAPER_TREE}
        if unnamed and tree == PAPER_TREE and current_platform.is_cpu():
            logger.warning(
                "griffin: no field names a tree, and the draft has no tree_acceptance to choose one by: "
                "taking %d nodes, more than pay on most CPUs. Measure with `vllm-griffin eval "
                "--write-trees`, or name a small tree (num_speculative_tokens 5, tree_depth 2, tree_top_k 3)",
                self.num_speculative_tokens,
            )
        assert self.tree_depth is not None and self.tree_top_k is not None
        return [TreeShape(self.num_speculative_tokens, self.tree_depth, self.tree_top_k)]

    def _resolve_candidates(self) -> list[TreeShape]:
        """The trees of `tree_acceptance` that are no larger than N, D and K, where those are named."""
        if not self.tree_acceptance:
            raise ValueError(
                "num_speculative_tokens_per_batch_size='auto' needs tree_acceptance, which the draft's "
                "config.json does not have: measure it with `vllm-griffin eval --write-trees`"
            )
        limits = (self.num_speculative_tokens, self.tree_depth, self.tree_top_k)
        trees: list[TreeShape] = []
        for text in self.tree_acceptance:
            shape = TreeShape.parse(text)
            sizes = (shape.nodes, shape.depth, shape.top_k)
            if shape.nodes in {known.nodes for known in trees}:
                raise ValueError(f"tree_acceptance has two trees of {shape.nodes} nodes: keep one")
            if all(
                limit is None or size <= limit for size, limit in zip(sizes, limits, strict=True)
            ):
                trees.append(shape)
        if not trees:
            raise ValueError(
                f"tree_acceptance has no tree within num_speculative_tokens={limits[0]}, "
                f"tree_depth={limits[1]}, tree_top_k={limits[2]}: it has {', '.join(self.tree_acceptance)}"
            )
        self.num_speculative_tokens = max(shape.nodes for shape in trees)
        self.tree_depth = max(shape.depth for shape in trees)
        self.tree_top_k = max(shape.top_k for shape in trees)
        # What vLLM reads until the steps are timed: sizes go by batch size, and which there are, since
        # it captures a graph for each. The order means nothing.
        largest, *others = sorted((shape.nodes for shape in trees), reverse=True)
        by_batch = enumerate([largest, 0, *others], start=1)
        self.num_speculative_tokens_per_batch_size = [(i, i, nodes) for i, nodes in by_batch]
        return trees

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
        try:
            schedule = validate_and_normalize_dynamic_sd_schedule(
                self.num_speculative_tokens_per_batch_size
            )
        except ValueError as error:
            raise ValueError(f"speculative_config[{SCHEDULE!r}]: {error}") from error
        most = max(nodes for _, _, nodes in schedule)
        if most > self.num_speculative_tokens:
            raise ValueError(
                f"num_speculative_tokens_per_batch_size asks for {most} nodes, "
                f"num_speculative_tokens={self.num_speculative_tokens} is the most: raise "
                "that, or ask for fewer"
            )

    def _check_budget(self) -> None:
        """A budget needs trees to choose from, and acceptance that goes by them."""
        if self.tree_budget is None:
            return
        if self.num_speculative_tokens_per_batch_size is not None:
            raise ValueError(
                "tree_budget is not supported with num_speculative_tokens_per_batch_size: name one "
                "number of nodes, num_speculative_tokens"
            )
        if self.rejection_sample_method == "synthetic":
            raise ValueError(
                "tree_budget is not supported with rejection_sample_method='synthetic': acceptance that "
                "is forced does not go by a tree's nodes"
            )
        if self.tree_budget >= self.num_speculative_tokens:
            raise ValueError(
                f"tree_budget={self.tree_budget} must be below num_speculative_tokens="
                f"{self.num_speculative_tokens}, the most nodes of one request"
            )

    def _check_quantization(self) -> None:
        if self.draft_quantization is None:
            return
        if not current_platform.is_cpu():
            raise ValueError(
                f"speculative_config['draft_quantization']={self.draft_quantization!r} is for CPUs: "
                "leave it out"
            )
        if not (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()):
            logger.warning(
                "griffin: this CPU has neither AVX-512 VNNI nor AMX, by which 8-bit numbers are multiplied "
                "fast: compare draft_quantization with leaving it out"
            )

    def _resolve_rejection(self) -> None:
        """Exact verification, or acceptance forced for a benchmark: a rate for each level of the tree."""
        if self.rejection_sample_method == "synthetic":
            rates = self._resolve_synthetic_acceptance_rates(
                self.tree_levels, self.synthetic_acceptance_rates, self.synthetic_acceptance_length
            )
            # vLLM checks that there is one for each drafted token.
            deeper = self.num_speculative_tokens - self.tree_levels
            self.synthetic_acceptance_rates = rates + deeper * [0.0]
            self.synthetic_acceptance_length = None
            logger.warning(
                "griffin: rejection_sample_method='synthetic' forces acceptance: outputs are not the target's"
            )
        elif self.rejection_sample_method != "standard":
            raise ValueError(
                f"speculative_config['rejection_sample_method']={self.rejection_sample_method!r} is "
                f"not supported with method 'griffin': leave it at 'standard', which is exact, or take "
                "'synthetic' for benchmarks"
            )
        elif self.synthetic_acceptance_rates or self.synthetic_acceptance_length is not None:
            raise ValueError(
                "synthetic_acceptance_rates and synthetic_acceptance_length are only valid with "
                "rejection_sample_method='synthetic'"
            )

    def _resolve_vocabulary(self, checkpoint: DraftCheckpoint) -> None:
        vocabulary = checkpoint.vocabulary(self.draft_vocab_size)
        whole = self.target_model_config.get_vocab_size()
        self.draft_vocab_size = whole if vocabulary is None else len(vocabulary)
        if self.tree_top_k is not None and self.tree_top_k > self.draft_vocab_size:
            raise ValueError(
                f"tree_top_k={self.tree_top_k} is above the vocabulary of "
                f"{self.draft_vocab_size} tokens: lower it"
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
        try:
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
        # transformers reads the file too, and raises errors of any type.
        except Exception as error:
            raise ValueError(
                f"{folder}/config.json: vLLM cannot read it as a model's config, correct it or take "
                f"a draft that `vllm-griffin convert` wrote ({first_line(error)})"
            ) from error
        if draft.quantization is not None:
            raise ValueError(
                f"{folder}: griffin does not support a quantised draft "
                f"(quantization={draft.quantization!r}): use its unquantised weights"
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

    def acceptance_by_nodes(self) -> dict[int, float]:
        """Acceptance length by nodes of the trees that "auto" chooses from."""
        assert self.tree_acceptance is not None
        lengths = {TreeShape.parse(tree): length for tree, length in self.tree_acceptance.items()}
        return {shape.nodes: lengths[shape] for shape in self.trees}

    @property
    def tree_sizes(self) -> list[int]:
        """Nodes of the trees that a step may be asked for, ascending."""
        by_batch = self.num_speculative_tokens_per_batch_size
        if by_batch is None:
            return [self.num_speculative_tokens]
        assert isinstance(by_batch, list), "'auto' was resolved"
        return sorted({nodes for _, _, nodes in by_batch} - {0})

    @property
    def tree_levels(self) -> int:
        """Levels that can hold a selected node: a tree of N nodes is at most N deep."""
        return max(shape.levels for shape in self.trees)

    @property
    def tree_width(self) -> int:
        """Nodes of a level, and children of a node, that can be selected: N at the most."""
        return max(shape.width for shape in self.trees)

    def __repr__(self) -> str:
        """Shows what the user asked for, in the engine's start-up line."""
        return (
            f"SpeculativeConfig(method='{METHOD}', model={self.draft_model_config.model!r}, "
            f"num_spec_tokens={self.num_speculative_tokens}, tree_depth={self.tree_depth}, "
            f"tree_top_k={self.tree_top_k}{', sizes by batch: auto' if self.adaptive else ''}"
            f"{f', tree_budget={self.tree_budget}' if self.tree_budget else ''})"
        )


def _name_draft_architecture(hf_config: Any) -> Any:
    """Published drafts name no architecture, or one that vLLM does not know.

    vLLM asks this class only for facts that a Llama shares (text in, tokens out, no pooling); the
    network itself is built by ``vllm_griffin.model.draft``.
    """
    hf_config.architectures = ["LlamaForCausalLM"]
    return hf_config


def make_config(asked: Mapping[str, Any], **engine: Any) -> GriffinSpeculativeConfig:
    """The config that a user asked for.

    Args:
        asked: fields of `speculative_config`, as the user wrote them.
        engine: `target_model_config`, `target_parallel_config` and `download_dir`.

    Raises:
        ValueError: one sentence that names the field or the file, and says what to do.
    """
    fields = {f.name for f in dataclasses.fields(GriffinSpeculativeConfig)} - {*SET_BY_VLLM}
    for name in asked:
        if name not in fields:
            raise ValueError(unknown_field(name, sorted(fields - REFUSED_FIELDS.keys())))
    try:
        return GriffinSpeculativeConfig(**asked, **engine)
    except ValidationError as error:
        name, value, text = sentence(error)
        raise ValueError(_refusal(name, value) if name in REFUSED_FIELDS else text) from None


def _refusal(field: str, value: Any) -> str:
    return (
        f"speculative_config['{field}']={value!r} is not supported with method 'griffin': "
        f"{REFUSED_FIELDS[field]}"
    )


def griffin_config(vllm_config: VllmConfig | None) -> GriffinSpeculativeConfig | None:
    """The griffin part of an engine's config, or None if it did not ask for griffin."""
    if vllm_config is None:
        return None
    speculative = vllm_config.speculative_config
    return speculative if isinstance(speculative, GriffinSpeculativeConfig) else None
