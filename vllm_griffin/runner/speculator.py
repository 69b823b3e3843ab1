"""The speculator: compacts the accepted path, extends the draft's cache by it, grows new trees.

Shapes: B requests of the batch, h hidden size, N nodes, K top_k, D levels.
"""

import functools
import itertools
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.dp_utils import DPSyncState
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_griffin.attention.backends import TreeAttentionMixin
from vllm_griffin.attention.metadata import TreeMetadata
from vllm_griffin.compat.patch import replace_attribute
from vllm_griffin.config import griffin_config
from vllm_griffin.grammar import attach_trees
from vllm_griffin.kernels.kv_compaction import PagedCaches, compact_kv
from vllm_griffin.kernels.top_tokens import top_tokens
from vllm_griffin.kernels.tree_attention import TreeContext
from vllm_griffin.kernels.tree_order import OrderedTree
from vllm_griffin.kernels.verify import Walk
from vllm_griffin.model.draft import GriffinDraftModel, connect_draft, load_draft_model
from vllm_griffin.model.level import TreeLevel
from vllm_griffin.runner.extend import DecodeRows, ExtendBatch, decode_rows, plan_extend
from vllm_griffin.runner.graphs import ExtendGraphs, TreeGraphs, TreeStart
from vllm_griffin.runner.levels import chain_rows, level_positions, level_rows
from vllm_griffin.runner.model_state import (
    GriffinModelState,
    VerifierSlot,
    num_logits_rows,
    root_rows,
)
from vllm_griffin.runner.sampler import max_chunk_rows
from vllm_griffin.tree import DraftTrees, Frontier, TreeGrower


class TreeSpeculator(DraftModelSpeculator):
    """Drafts a tree per request with the GRIFFIN (or EAGLE) network."""

    model: GriffinDraftModel

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        spec = griffin_config(vllm_config)
        assert spec is not None
        self.num_nodes = spec.num_speculative_tokens
        self.top_k = spec.tree_width
        self.max_path = 1 + spec.tree_levels
        self.trees = DraftTrees(self.max_num_reqs, self.num_nodes, device)
        self.verifier_slot = VerifierSlot(
            self.trees, self.max_path, spec.synthetic_acceptance_rates
        )
        self._caches: list[tuple[list[str], PagedCaches]] = []
        self._cache_addresses: list[int] = []
        self._target: Any = None
        self._target_reloaded = False
        # Nodes of the trees that a step may be asked for
        self.sizes = spec.tree_sizes
        # By number of nodes: a tree of the config, or a smaller part of the largest.
        shapes = {shape.nodes: shape for shape in spec.trees}
        whole = shapes[self.num_nodes]
        shapes = {size: replace(whole, nodes=size) for size in self.sizes} | shapes
        self.growers = {n: TreeGrower(s.levels, s.width, device) for n, s in shapes.items()}
        self.graphs: TreeGraphs | None = None
        self.extend_graphs: ExtendGraphs | None = None
        # Turned off where no tree pays at all; the draft's cache is then not kept up either.
        self.drafting = True
        self.adaptive = spec.adaptive
        self.shares_nodes = spec.tree_budget is not None

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> GriffinDraftModel:
        """Loads the draft, and has the target ask for our model state.

        Raises:
            ValueError: The target brings a model state of its own, or attention that knows no trees.
        """
        if hasattr(target_model, "get_model_state_cls"):
            raise ValueError(
                f"method 'griffin' does not support {type(target_model).__name__}: it brings a "
                "model state of its own; use a text-only decoder"
            )
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in sorted(target_attn_layer_names):
            if not isinstance(layers[name].impl, TreeAttentionMixin):
                raise ValueError(
                    f"method 'griffin' does not support attention by {type(layers[name]).__name__} "
                    f"({name}): use a full-attention target"
                )
        self._target = target_model
        state = functools.partial(
            GriffinModelState, trees=self.trees, verifier_slot=self.verifier_slot
        )

        def model_state_cls() -> Any:
            # vLLM asks once. A model may outlive its engine, and must not keep the engine's memory.
            del target_model.__dict__["get_model_state_cls"]
            return state

        # Not an attribute of the module's own kind (tensor, submodule), so past its __setattr__.
        target_model.__dict__["get_model_state_cls"] = model_state_cls
        self.target_attn_layer_names = sorted(target_attn_layer_names)
        draft = load_draft_model(target_model, self.vllm_config)
        if draft.draft_tokens is not None:
            self._watch_weights()
        return draft

    def _watch_weights(self) -> None:
        """Has the draft's copy of head rows made anew once the target has loaded other weights.

        Not at once: vLLM may still have to process them. Weights that come in a kernel's format
        (``is_checkpoint_format=False``) pass this by; the old rows then draft, and only that.
        """
        load_weights: Any = self._target.load_weights
        # The model may outlive this engine.
        speculator = weakref.ref(self)

        def loading(*args: Any, **kwargs: Any) -> Any:
            if (alive := speculator()) is not None:
                alive._target_reloaded = True
            return load_weights(*args, **kwargs)

        self._target.__dict__["load_weights"] = loading

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's.

        Raises:
            ValueError: A backend reads the cache in smaller blocks than the block tables name.
        """
        super().set_attn(*args, **kwargs)
        for group in itertools.chain(*self.attn_groups, *self.target_attn_groups):
            if group.kernel_block_size is not None:
                raise ValueError(
                    f"method 'griffin' does not support block_size={group.kv_cache_spec.block_size} "
                    f"with attention backend {group.backend.get_name()}, which reads blocks of "
                    f"{group.kernel_block_size}: set block_size to that"
                )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Plans graphs of the draft where the target's verification gets full graphs."""
        self.graphs = self.extend_graphs = None
        if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
            return
        shape = (self.max_num_reqs, self.hidden_size)
        dtype = next(self.model.parameters()).dtype
        prefix_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=self.device)
        buffers = TreeStart(
            predict=torch.zeros(shape, dtype=dtype, device=self.device),
            regress=torch.zeros(shape, dtype=dtype, device=self.device),
            prefix_lens=prefix_lens,
            block_table=self._block_table(),
            spine_first=torch.zeros_like(prefix_lens, dtype=torch.bool)
            if self.shares_nodes
            else None,
        )
        self.graphs = TreeGraphs(
            self.vllm_config,
            self.device,
            {size: self.growers[size].top_k for size in self.sizes},
            self._grow,
            buffers,
        )
        rows = DecodeRows.padding(
            self.max_num_reqs, self.max_path, self.hidden_size, dtype, self.device
        )
        self.extend_graphs = ExtendGraphs(
            self.vllm_config, self.device, self._extend_decodes, rows, buffers
        )

    def capture(self) -> None:
        """Captures what was planned; a first pass over prompts, whose shape varies, runs eagerly."""
        if self.graphs is not None and self.extend_graphs is not None:
            self.extend_graphs.capture_pass()
            self.graphs.capture_growth()

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        # [num_tokens, h]
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        # [B]
        num_sampled: torch.Tensor,
        # [B]
        num_rejected: torch.Tensor,
        # [max_num_reqs, 1]
        last_sampled: torch.Tensor,
        # [lookahead, max_num_reqs]
        next_prefill_tokens: torch.Tensor,
        # [max_num_reqs]
        temperature: torch.Tensor,
        # [max_num_reqs]
        seeds: torch.Tensor,
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Returns the next trees' tokens, [B, N], in the order in which they are verified.

        A tree of `num_speculative_tokens` nodes, if that is given and below N, is in the first columns.
        """
        num_reqs = input_batch.num_reqs
        size = self.num_nodes if num_speculative_tokens is None else num_speculative_tokens
        if dummy_run:
            if is_profile:
                self._profile_verification(last_hidden_states)
            return self._dummy_propose(num_reqs, input_batch.num_tokens)
        if self._target_reloaded:
            connect_draft(self.model, self._target, self.vllm_config)
            self._target_reloaded = False
        assert self.verifier_slot.verifier is not None
        walk = self.verifier_slot.verifier.take_walk()
        if walk is not None:
            self._compact_target_cache(input_batch, slot_mappings, walk)
        if not self.drafting:
            return self.draft_tokens[:num_reqs]
        if size == 0:
            self.trees.clear(input_batch.idx_mapping)
            if self.adaptive and not input_batch.has_prefill:
                # The draft's cache keeps a hole here; `TreeSizes` counts it.
                return self.draft_tokens[:num_reqs]
        if walk is None:
            walk = self._roots_alone(input_batch, last_sampled)
        # In the middle of a prompt the next token is the prompt's, whatever was drawn.
        walk.tokens[:, 0] = torch.where(
            num_sampled > 0,
            walk.tokens[:, 0],
            next_prefill_tokens[0, input_batch.idx_mapping].long(),
        )
        start = self._first_pass(input_batch, walk, num_sampled, slot_mappings, last_hidden_states)
        if size == 0:
            return self.draft_tokens[:num_reqs]
        # One budget for all trees is shared out by score; a spine is for those who can use nothing else.
        if self.shares_nodes:
            start = replace(start, spine_first=self.trees.spine_only[input_batch.idx_mapping])
        tree = None if self.graphs is None else self.graphs.replay(start, size)
        if tree is None:
            tree = self._grow(start, size)
        self.trees.store(input_batch.idx_mapping, tree, num_sampled > 0)
        attach_trees(input_batch, self.trees)
        return pad(tree.tokens, (0, self.num_nodes - size))

    def _roots_alone(self, batch: InputBatch, last_sampled: torch.Tensor) -> Walk:
        """The walk of a step that had nothing to verify."""
        shape = (batch.num_reqs, self.max_path)
        walk = Walk(
            path=torch.zeros(shape, dtype=torch.int32, device=self.device),
            tokens=torch.zeros(shape, dtype=torch.int64, device=self.device),
            num_accepted=torch.ones(batch.num_reqs, dtype=torch.int32, device=self.device),
        )
        walk.tokens[:, 0] = last_sampled[batch.idx_mapping, 0]
        return walk

    def _compact_target_cache(
        self, batch: InputBatch, slot_mappings: dict[str, torch.Tensor], walk: Walk
    ) -> None:
        """Moves the accepted path's keys and values to the front of its span, in every layer."""
        row_start = root_rows(batch, num_logits_rows(batch))
        for names, caches in self._target_caches():
            compact_kv(caches, slot_mappings[names[0]], row_start, walk.path, walk.num_accepted)

    def _target_caches(self) -> list[tuple[list[str], PagedCaches]]:
        """The target's layers by KV cache group, with their caches."""
        context = self.vllm_config.compilation_config.static_forward_context
        layers = {name: context[name] for name in self.target_attn_layer_names}
        # vLLM may give the layers other memory, as after sleep.
        addresses = [layer.kv_cache.data_ptr() for layer in layers.values()]
        if addresses != self._cache_addresses:
            self._cache_addresses = addresses
            self._caches = []
            for group in self.kv_cache_config.kv_cache_groups:
                names = [name for name in group.layer_names if name in layers]
                views = [layers[name].impl.kv_views(layers[name].kv_cache) for name in names]
                if names:
                    self._caches.append((names, PagedCaches(*map(list, zip(*views, strict=True)))))
        return self._caches

    def _first_pass(
        self,
        batch: InputBatch,
        walk: Walk,
        num_sampled: torch.Tensor,
        slot_mappings: dict[str, torch.Tensor],
        hidden_states: torch.Tensor,
    ) -> TreeStart:
        """Extends the draft's cache by what became text, in a graph if the batch has one."""
        if self.extend_graphs is not None and self.extend_graphs.fits(batch.num_reqs):
            slots = slot_mappings[next(iter(self.draft_attn_layer_names))]
            rows = decode_rows(batch, walk, num_sampled, slots, hidden_states)
            if rows is not None:
                return self.extend_graphs.replay(rows)
        extend = plan_extend(batch, walk, num_sampled, self.max_path)
        predict, regress = self._extend(batch, extend, slot_mappings, hidden_states)
        return TreeStart(
            predict=predict[extend.last_rows],
            regress=regress[extend.last_rows],
            prefix_lens=extend.prefix_lens,
            block_table=self._block_table()[: batch.num_reqs],
            spine_first=None,
        )

    def _extend_decodes(self, rows: DecodeRows, into: TreeStart) -> None:
        """The first draft pass over decodes, in tensors and launches that are the same in every step.

        Its rows are a chain behind each request's keys, attended as a tree's level is.
        """
        batch, max_path = rows.tokens.shape
        chain = chain_rows(batch, max_path, self.device)
        local = torch.arange(max_path, device=self.device)
        positions = (rows.positions.unsqueeze(1) + local).clamp(max=self.max_model_len - 1)
        context = TreeContext(
            block_table=into.block_table,
            prefix_lens=rows.positions.to(torch.int32),
            q_start=chain.q_start,
            num_rows=chain.num_rows,
            tail_start=chain.q_start,
            tail_bits=chain.bits,
        )
        (name,) = self.draft_attn_layer_names
        with set_forward_context(
            {name: TreeMetadata(context)},
            self.vllm_config,
            num_tokens=batch * max_path,
            slot_mapping={name: rows.slots.flatten()},
        ):
            predict, regress = self.model(
                rows.tokens.flatten(), positions.flatten(), rows.features.flatten(0, 1)
            )
        last = chain.q_start + rows.accepted - 1
        into.predict.copy_(predict[last])
        into.regress.copy_(regress[last])
        into.prefix_lens.copy_(rows.positions + rows.accepted)

    def _extend(
        self,
        batch: InputBatch,
        extend: ExtendBatch,
        slot_mappings: dict[str, torch.Tensor],
        hidden_states: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first draft pass: causal, over the tokens that became text in this step."""
        num_reqs, num_rows = batch.num_reqs, int(extend.query_start_np[-1])
        buffers = self.input_buffers
        buffers.seq_lens[:num_reqs] = extend.seq_lens
        async_tensor_h2d(extend.query_start_np, out=buffers.query_start_loc[: num_reqs + 1])
        buffers.positions[:num_rows] = extend.positions
        layer_name = next(iter(self.draft_attn_layer_names))
        slots = slot_mappings[layer_name][extend.slot_rows]
        slots = slots.where(extend.slot_rows >= 0, PAD_SLOT_ID)
        # A host tensor, so nothing waits.
        longest = int(batch.seq_lens_cpu_upper_bound[:num_reqs].numpy().max())
        replace_attribute(self, "draft_max_seq_len", min(longest, self.max_model_len))
        metadata = self._build_attn_metadata(
            num_reqs=num_reqs,
            batch_desc=BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.NONE, num_tokens=num_rows, num_reqs=num_reqs
            ),
            query_start_loc_np=extend.query_start_np,
            seq_lens_cpu_upper_bound=batch.seq_lens_cpu_upper_bound,
            step=0,
            slot_mappings=slots.unsqueeze(0).expand(len(self.kv_cache_config.kv_cache_groups), -1),
        )
        assert metadata is not None
        with set_forward_context(
            metadata, self.vllm_config, num_tokens=num_rows, slot_mapping={layer_name: slots}
        ):
            return self.model(extend.input_ids, extend.positions, hidden_states[extend.hidden_rows])

    def _block_table(self) -> torch.Tensor:
        """[max_num_reqs, max_blocks] int32: blocks of the draft's cache, which vLLM writes in place."""
        layer_name = next(iter(self.draft_attn_layer_names))
        groups = self.kv_cache_config.kv_cache_groups
        (group,) = [i for i, g in enumerate(groups) if layer_name in g.layer_names]
        return self.block_tables.input_block_tables[group]

    def _grow(self, start: TreeStart, size: int) -> OrderedTree:
        """Grows trees of `size` nodes from the draft's outputs at the last token."""
        grower = self.growers[size]
        batch, k = len(start.prefix_lens), grower.top_k
        frontier = grower.begin(*self._children(start.predict, k))
        features = start.regress.repeat_interleave(k, dim=0, output_size=batch * k)
        scratch = self._scratch(batch, grower)
        # The last level is not expanded.
        expanded = grower.levels - 1
        positions = level_positions(start.prefix_lens, k, expanded, self.max_model_len)
        for i in range(expanded):
            predict, regress = self.model(
                frontier.tokens.flatten(),
                positions[i],
                features,
                self._level(start, frontier, grower, scratch, i),
            )
            logprobs, tokens = self._children(predict, k)
            frontier = grower.advance(
                frontier, logprobs.view(batch, k, k), tokens.view(batch, k, k)
            )
            features = regress.view(batch, k, -1).gather(
                1, frontier.parents.long().unsqueeze(-1).expand(-1, -1, regress.shape[-1])
            )
            features = features.flatten(0, 1)
        return grower.finish(size, start.spine_first)

    def _children(self, predict: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, h] -> the k best tokens of each row and their log-probabilities, [rows, k].

        So many rows at a time that logits, of which there may be copies, stay small beside the KV cache.
        """
        parts = []
        for part in predict.split(max_chunk_rows(self.vocab_size)):
            logits = self.model.compute_logits(part)
            assert logits is not None, "every rank gathers the logits"
            parts.append(top_tokens(logits, k))
        logprobs, rows = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
        return logprobs, self.model.target_tokens(rows)

    def _scratch(self, batch: int, grower: TreeGrower) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the nodes expanded so far, for this step only."""
        heads, head_dim = self.model.num_kv_heads, self.model.head_dim
        shape = (batch * grower.scratch_size, heads, head_dim)
        dtype = next(self.model.parameters()).dtype
        return (
            torch.empty(shape, dtype=dtype, device=self.device),
            torch.empty(shape, dtype=dtype, device=self.device),
        )

    def _level(
        self,
        start: TreeStart,
        frontier: Frontier,
        grower: TreeGrower,
        scratch: tuple[torch.Tensor, torch.Tensor],
        index: int,
    ) -> TreeLevel:
        batch, k = frontier.tokens.shape
        rows = level_rows(self.max_num_reqs, k, grower.scratch_size, self.device).of(batch)
        context = TreeContext(
            block_table=start.block_table,
            prefix_lens=start.prefix_lens,
            q_start=rows.q_start,
            num_rows=rows.num_rows,
            tail_start=rows.tail_start,
            tail_bits=frontier.bits,
        )
        return TreeLevel(context, *scratch, rows.write_rows[index])

    def _profile_verification(self, hidden_states: torch.Tensor) -> None:
        """Lets memory profiling see a verification's logits, and the copies of a chunk that is sampled from.

        vLLM's own profiling takes one row of logits a request.
        """
        assert self.verifier_slot.verifier is not None
        assert self._target is not None
        rows = min(len(hidden_states), self.max_num_reqs * (1 + self.num_nodes))
        logits = self._target.compute_logits(hidden_states[:rows])
        if logits is not None:
            chunk = logits[: max_chunk_rows(logits.shape[1])]
            # FlashInfer, where it draws, holds masked logits and probabilities beside the copy.
            more = 2 if self.verifier_slot.verifier.sampler.use_flashinfer else 0
            chunk.to(torch.float32, copy=True).repeat(more, 1)

    def _dummy_propose(self, num_reqs: int, num_tokens: int) -> torch.Tensor:
        """Runs the draft once without a cache, so that memory profiling sees its largest pass."""
        ids = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        dtype = next(self.model.parameters()).dtype
        hidden = torch.zeros(num_tokens, self.hidden_size, dtype=dtype, device=self.device)
        with set_forward_context(None, self.vllm_config, num_tokens=num_tokens):
            predict, _ = self.model(ids, ids, hidden)
        rows = min(num_reqs * self.top_k, num_tokens)
        self._children(predict[:rows], self.top_k)
        return self.draft_tokens[:num_reqs]
