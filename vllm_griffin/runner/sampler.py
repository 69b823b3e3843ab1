"""Tree verification with vLLM's own sampler.

The sampler's noise is keyed by (seed, position, token) alone. Drawing one token at every row of the
tree with it, and walking from the root while a child equals the draw, gives exactly what the engine
would give without speculation, at any temperature.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_griffin.kernels.path_ranks import path_ranks
from vllm_griffin.kernels.verify import Walk, walk_tree
from vllm_griffin.runner.output import TreeSamplerOutput, widen
from vllm_griffin.runner.synthetic import SyntheticVerifier
from vllm_griffin.tree import DraftTrees

if TYPE_CHECKING:
    from vllm_griffin.runner.trace import StepTrace

# Float32 copies of the logits that one chunk of the verification may hold, as vLLM's chains do.
MAX_CHUNK_BYTES = 1 << 30


def max_chunk_rows(vocab_size: int) -> int:
    """Rows with logits that are verified at once."""
    return max(1, MAX_CHUNK_BYTES // (4 * vocab_size))


class TreeVerifier:
    """Stands in vLLM's rejection sampler's place.

    Shapes: L logits rows of the batch, B requests, P = 1 + levels of the tree.
    """

    # vLLM's warm-up on a GPU asks its rejection sampler for it.
    enable_adaptive_verification = False

    def __init__(
        self,
        sampler: Sampler,
        trees: DraftTrees,
        max_path: int,
        trace: "StepTrace | None",
        synthetic: SyntheticVerifier | None = None,
    ) -> None:
        self.sampler = sampler
        self.trees = trees
        self.max_path = max_path
        self.trace = trace
        self.synthetic = synthetic
        # The walk of this step, for the speculator that runs after it; None = nothing was drafted.
        self.walk: Walk | None = None

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> TreeSamplerOutput:
        """Verifies the batch; ``logits`` [L, V], ``invalid_drafts`` [L] bool or None."""
        assert draft_logits is None, "griffin drafts its trees without sampling"
        num_nans = get_num_nans(logits) if self.sampler.compute_nans else None
        dims = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        chunks = [
            self._verify(logits, input_batch, invalid_drafts, dims, start, end)
            for start, end in self._chunks(input_batch.cu_num_logits_np, logits.shape[1])
        ]
        walks = [walk for walk, _ in chunks]
        self.walk = Walk(*(torch.cat(parts) for parts in zip(*walks, strict=True)))
        if self.trace is not None:
            self.trace.record(input_batch, self.trees, self.walk)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            self.walk.num_accepted.clone(),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        ranks = path_ranks(
            self.walk.path,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.trees.parents,
            self.trees.depths,
            self.trees.num_nodes,
        )
        return TreeSamplerOutput(
            sampled_token_ids=widen(self.walk.tokens, ranks),
            logprobs_tensors=self._join_logprobs([logprobs for _, logprobs in chunks], input_batch),
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def take_walk(self) -> Walk | None:
        """The walk of this step; a step's walk is used once."""
        walk, self.walk = self.walk, None
        return walk

    def _chunks(self, cu_num_logits: np.ndarray, vocab_size: int) -> Iterator[tuple[int, int]]:
        """Ranges of whole requests whose logits fit into one chunk."""
        limit = max_chunk_rows(vocab_size)
        start = 0
        while start < len(cu_num_logits) - 1:
            end = int(np.searchsorted(cu_num_logits, cu_num_logits[start] + limit, "right")) - 1
            end = max(end, start + 1)
            yield start, end
            start = end

    def _verify(
        self,
        logits: torch.Tensor,
        batch: InputBatch,
        invalid_drafts: torch.Tensor | None,
        logprobs_dims: tuple[int, int] | None,
        start: int,
        end: int,
    ) -> tuple[Walk, LogprobsTensors | None]:
        """Draws at every row of requests ``start`` .. ``end`` and walks their trees."""
        low, high = int(batch.cu_num_logits_np[start]), int(batch.cu_num_logits_np[end])
        rows = slice(low, high)
        indices = batch.logits_indices[rows]
        drawn, processed = self.sampler.sample(
            logits[rows],
            batch.expanded_idx_mapping[rows],
            batch.idx_mapping[start:end],
            batch.idx_mapping_np[start:end],
            batch.positions[indices],
            batch.input_ids[indices],
            batch.expanded_local_pos[rows],
            batch.seq_lens_cpu_upper_bound.numpy()[start:end],
            return_logprobs=logprobs_dims is not None,
        )
        cu_num_logits = batch.cu_num_logits[start : end + 1] - low
        slots = batch.idx_mapping[start:end]
        if self.synthetic is not None:
            walk = self.synthetic.walk(drawn, cu_num_logits, slots)
        else:
            walk = walk_tree(
                drawn,
                cu_num_logits,
                slots,
                self.trees.tokens,
                self.trees.parents,
                self.trees.num_nodes,
                self.trees.spine_len,
                self.trees.spine_only,
                None if invalid_drafts is None else invalid_drafts[rows],
                self.max_path,
            )
        if logprobs_dims is None:
            return walk, None
        if self.sampler.logprobs_mode not in PROCESSED_LOGPROBS_MODES:
            processed = logits[rows]
        return walk, self._logprobs(processed, walk, batch, start, end, logprobs_dims)

    def _path_rows(self, batch: InputBatch, start: int = 0, end: int | None = None) -> np.ndarray:
        """Rows of the output that each request's path can fill: as many as were scheduled, at most P."""
        assert batch.num_draft_tokens_per_req is not None
        return np.minimum(1 + batch.num_draft_tokens_per_req[start:end], self.max_path)

    def _logprobs(
        self,
        logits: torch.Tensor,
        walk: Walk,
        batch: InputBatch,
        start: int,
        end: int,
        dims: tuple[int, int],
    ) -> LogprobsTensors:
        """Log-probabilities at the accepted rows, which lie anywhere among a request's logits."""
        num_logprobs, max_token_ids = dims
        counts = self._path_rows(batch, start, end)
        request, place = async_tensor_h2d(
            np.stack(
                [
                    np.repeat(np.arange(end - start), counts),
                    np.concatenate([np.arange(n) for n in counts]),
                ]
            ),
            device=logits.device,
        )
        first_row = (batch.cu_num_logits[start:end] - batch.cu_num_logits[start]).long()
        rows = first_row[request] + walk.path[request, place]
        return compute_topk_scores(
            logits[rows],
            num_logprobs,
            walk.tokens[request, place],
            None,
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=batch.idx_mapping[start:end][request],
            max_per_req_token_ids=max_token_ids,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )

    def _join_logprobs(
        self, chunks: list[LogprobsTensors | None], batch: InputBatch
    ) -> LogprobsTensors | None:
        """One tensor set for the batch, and where each request's rows begin."""
        present = [chunk for chunk in chunks if chunk is not None]
        if not present:
            return None
        counts = self._path_rows(batch)
        starts = [0, *np.cumsum(counts).tolist()]
        return LogprobsTensors.cat(present, cu_num_generated_tokens=starts)
