"""What the target's forward pass needs to know of the trees: positions and ancestor masks."""

import os
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from vllm_griffin.attention.metadata import TreeRows, attach_tree
from vllm_griffin.config import griffin_config
from vllm_griffin.runner.processors import watch_processors
from vllm_griffin.runner.sampler import TreeVerifier
from vllm_griffin.runner.synthetic import SyntheticVerifier
from vllm_griffin.tree import DraftTrees


class GriffinModelState(DefaultModelState):
    """vLLM's per-request model state, with trees in the rows that it schedules as drafts."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
        *,
        trees: DraftTrees,
        verifier_slot: "VerifierSlot",
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.trees = trees
        self.verifier_slot = verifier_slot
        spec = griffin_config(vllm_config)
        assert spec is not None
        self._sizes = spec.tree_sizes
        self._chains = spec.tree_width == 1
        slots = vllm_config.scheduler_config.max_num_seqs
        self.rows = TreeRows.empty(slots, trees.bits)

    def custom_sampler(self, sampler: Sampler) -> tuple[Sampler, TreeVerifier]:
        """vLLM's sampler stays; its rejection sampler gives way to tree verification."""
        watch_processors(sampler, self.trees)
        return sampler, self.verifier_slot.install(sampler)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """The slot may still hold the tree of the request before: forget it."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        self.trees.reset(req_index, params is not None and reads_history(params))
        if params is not None and params.prompt_logprobs is not None:
            _forget_empty_prompt_logprobs(new_req_data, params)

    def remove_request(self, req_id: str) -> None:
        """Ends the request's trace."""
        super().remove_request(req_id)
        self.verifier_slot.forget(req_id)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """vLLM's attention metadata with the batch's trees attached."""
        attn_metadata = super().prepare_attn(input_batch, cudagraph_mode, *args, **kwargs)
        # vLLM names it in each of its calls.
        if kwargs.get("for_capture"):
            rows = self._rows_to_capture(input_batch)
            alone = rows is not None
        else:
            full = cudagraph_mode == CUDAGraphMode.FULL
            rows, alone = self._tree_rows(input_batch, full)
            if full and not alone:
                # What a graph of so many rows a request was captured with.
                causal = self._causal(int(input_batch.num_scheduled_tokens[0]) - 1)
                assert causal and rows is None, "not what the graph holds"
        attach_tree(attn_metadata, rows, alone)
        return attn_metadata

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, torch.Tensor | None]:
        """Rewrites the positions of tree rows from consecutive to root + depth, in place.

        Their cache slots were computed before, from the consecutive ones. The sampler reads the new
        ones: noise is keyed by the position of the token in the text.
        """
        inputs = super().prepare_inputs(input_batch, req_states)
        if input_batch.num_draft_tokens > 0:
            rows = input_batch.logits_indices
            local = input_batch.expanded_local_pos.long()
            depth = self.trees.depths[input_batch.expanded_idx_mapping, local]
            input_batch.positions[rows] += depth - local
        return inputs

    def _tree_rows(self, batch: InputBatch, full_graph: bool) -> tuple[TreeRows | None, bool]:
        """The batch's trees, if any is more than a chain, and whether the batch has no other rows.

        A full graph has requests more than the batch, which get no rows.
        """
        drafts = batch.num_draft_tokens_per_req
        if drafts is None or self._causal(int(drafts.max())):
            return None, False
        alone = bool(((drafts > 0) & (batch.num_scheduled_tokens == 1 + drafts)).all())
        num_reqs = batch.num_reqs
        num_logits = num_logits_rows(batch)
        rows = self.rows.of(num_reqs, self.rows.bits.shape[1])
        rows.q_start.copy_(root_rows(batch, num_logits))
        # One row is a plain decode or the end of a prefill: causal attention is right for it.
        # Where all are trees it may be a tree of no nodes, which nothing else attends.
        rows.num_rows.copy_(num_logits if alone else torch.where(num_logits > 1, num_logits, 0))
        # Without tree rows nothing of the request is to be read.
        before = batch.seq_lens[:num_reqs] - rows.num_rows
        rows.prefix_lens.copy_(torch.where(rows.num_rows > 0, before, 0))
        torch.index_select(self.trees.bits, 0, batch.idx_mapping, out=rows.bits)
        padded = batch.num_reqs_after_padding if full_graph else num_reqs
        if padded > num_reqs:
            self.rows.num_rows[num_reqs:padded] = 0
            self.rows.prefix_lens[num_reqs:padded] = 0
        # A size that there are kernels for: where all trees are trimmed, another would be compiled.
        size = next(n for n in self._sizes if n >= drafts.max())
        return self.rows.of(padded, 1 + size), alone

    def _causal(self, most_nodes: int) -> bool:
        """Whether causal attention is right for trees of up to so many nodes: chains see all before them.

        A captured graph and its replays have the same number, and so decide alike.
        """
        return most_nodes <= 1 or self._chains

    def _rows_to_capture(self, batch: InputBatch) -> TreeRows | None:
        """Rows for the capture of a full graph of a uniform batch; None if its rows are causal.

        A replay has the same number of rows a request, and all of them of trees: vLLM runs batches
        with a prefill otherwise.
        """
        num_rows = int(batch.num_scheduled_tokens[0])
        assert (batch.num_scheduled_tokens == num_rows).all(), "full graphs are of uniform batches"
        if self._causal(num_rows - 1):
            return None
        rows = self.rows.of(batch.num_reqs, num_rows)
        rows.q_start.copy_(batch.query_start_loc[: batch.num_reqs])
        rows.num_rows.fill_(num_rows)
        rows.prefix_lens.zero_()
        rows.bits.copy_(self.trees.bits[: batch.num_reqs, :num_rows])
        return rows


def num_logits_rows(batch: InputBatch) -> torch.Tensor:
    """[B] int32: rows of each request that have logits, its last ones."""
    return (batch.cu_num_logits[1:] - batch.cu_num_logits[:-1]).to(torch.int32)


def root_rows(batch: InputBatch, num_logits: torch.Tensor) -> torch.Tensor:
    """[B] int32: first row with logits of each request, which has so many; the root, if it has a tree."""
    return (batch.query_start_loc[1 : batch.num_reqs + 1] - num_logits).to(torch.int32)


class VerifierSlot:
    """Where the speculator, built first, finds the verifier that the model state builds later."""

    def __init__(self, trees: DraftTrees, max_path: int, rates: list[float] | None) -> None:
        self._trees = trees
        self._max_path = max_path
        self._synthetic = None if rates is None else SyntheticVerifier(rates, trees, max_path)
        self.verifier: TreeVerifier | None = None

    def install(self, sampler: Sampler) -> TreeVerifier:
        """Builds the verifier around vLLM's sampler."""
        trace = None
        # All ranks decide alike, so one writes for all.
        if os.environ.get("VLLM_GRIFFIN_TRACE") and get_tensor_model_parallel_rank() == 0:
            from vllm_griffin.runner.trace import StepTrace

            trace = StepTrace(os.environ["VLLM_GRIFFIN_TRACE"])
        self.verifier = TreeVerifier(sampler, self._trees, self._max_path, trace, self._synthetic)
        return self.verifier

    def forget(self, request_id: str) -> None:
        """Passes the end of a request on to the trace, if there is one."""
        if self.verifier is not None and self.verifier.trace is not None:
            self.verifier.trace.forget(request_id)


def _forget_empty_prompt_logprobs(new_req_data: NewRequestData, params: SamplingParams) -> None:
    """With one prompt token left to compute there are none, and vLLM must not look for any.

    Its scheduler may place drafts after that token, which vLLM takes for rows of the prompt (with
    any speculative method).
    """
    if new_req_data.prompt_len - new_req_data.num_computed_tokens == 1:
        new_req_data.sampling_params = params.clone()
        new_req_data.sampling_params.prompt_logprobs = None


def reads_history(params: SamplingParams) -> bool:
    """Whether a request's logits processors read its earlier tokens.

    vLLM's processors take the preceding rows of a request for the text before a row. On a tree that
    holds on the spine only, so such a request is verified there.
    """
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.bad_words
        or params.thinking_token_budget is not None
    )
