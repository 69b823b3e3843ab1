"""Custom logits processors: the requests that they change are verified on their spine."""

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_griffin.tree import DraftTrees

# vLLM's own, of which `reads_history` knows which requests read their earlier tokens.
NATIVE = (LogitBiasState, PenaltiesState, BadWordsState)


def watch_processors(sampler: Sampler, trees: DraftTrees) -> None:
    """Wraps the sampler's custom processors, of the engine's arguments or of installed plugins."""
    sampler.logits_processors = [
        processor if type(processor) in NATIVE else SpineProcessor(processor, trees)
        for processor in sampler.logits_processors
    ]


class SpineProcessor(LogitsProcessor):
    """A custom processor that may read a request's earlier tokens from the rows before a row.

    That is the contract of vLLM's `LogitsContext` for drafts, and true along the spine only.
    """

    def __init__(self, processor: LogitsProcessor, trees: DraftTrees) -> None:
        self.processor = processor
        self.trees = trees

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """The processor says whether it changes the request's logits."""
        changes = self.processor.add_request(req_idx, sampling_params)
        if changes:
            self.trees.keep_to_spine(req_idx)
        return changes

    def apply_staged_writes(self) -> None:
        """As the processor does."""
        self.processor.apply_staged_writes()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Changes ``logits`` [L, V] as the processor does; rows past a spine are never accepted."""
        return self.processor.apply(logits, ctx)
