"""How what a step saw of its trees travels to the scheduler: in columns behind the sampled tokens.

vLLM copies the sampled tokens to the host anyway. A second copy would cost a step more than these
columns do.

Shapes: B requests, P rows of the longest path.
"""

from dataclasses import dataclass, field

import torch
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.sample.output import SamplerOutput


@dataclass
class TreeSamplerOutput(SamplerOutput):
    """``sampled_token_ids`` is [B, 2P + 1]: the tokens, then the rows of ``path_ranks``."""


@dataclass
class TreeRunnerOutput(ModelRunnerOutput):
    """A step's output with what its trees were.

    Attributes:
        path_ranks: request -> nodes and depth of its verified tree, then the accepted nodes' sibling
            ranks, padded with 0 to P + 1 numbers.
    """

    path_ranks: dict[str, list[int]] = field(default_factory=dict)


def widen(tokens: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """[B, P] tokens and [B, P + 1] of ``path_ranks`` as the [B, 2P + 1] that vLLM copies to the host.

    vLLM reads the first ``num_sampled`` columns of a row and takes any number of columns.
    """
    return torch.cat([tokens, ranks], dim=1)


def split_columns(output: AsyncOutput) -> list[list[int]]:
    """Takes the columns behind the tokens off an output that has arrived on the host."""
    output.copy_event.synchronize()
    width = output.sampled_token_ids.shape[1] // 2
    columns = output.sampled_token_ids[:, width:].tolist()
    output.sampled_token_ids = output.sampled_token_ids[:, :width]
    return columns
