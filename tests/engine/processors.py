"""Custom logits processors for tests, which a request asks for in its ``extra_args``."""

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)


class _Asked(LogitsProcessor):
    """Changes the logits of requests that name ``key`` in their ``extra_args``."""

    key: str

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState) -> None:
        self.states = req_states
        # request slot -> what the request asked for
        self.asked: dict[int, Any] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self.asked[req_idx] = (sampling_params.extra_args or {}).get(self.key)
        return self.asked[req_idx] is not None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        for row, slot in enumerate(ctx.expanded_idx_mapping.tolist()):
            if self.asked.get(slot) is not None:
                self.change(logits[row], self.asked[slot], slot, row, ctx)
        return logits

    def change(
        self, logits: torch.Tensor, value: Any, slot: int, row: int, ctx: LogitsContext
    ) -> None:
        """Changes one row's logits [V] in place."""
        raise NotImplementedError


class NoRepeat(_Asked):
    """Bans the last ``no_repeat`` tokens of the text, drafts included, as vLLM's contract says."""

    key = "no_repeat"

    def change(
        self, logits: torch.Tensor, value: int, slot: int, row: int, ctx: LogitsContext
    ) -> None:
        length = int(self.states.total_len.gpu[slot])
        text = self.states.all_token_ids.gpu[slot, :length].tolist()
        first = row - int(ctx.expanded_local_pos[row])
        text += ctx.input_ids[first + 1 : row + 1].tolist()
        logits[text[-value:]] = float("-inf")


class Sharpen(_Asked):
    """Scales the logits by ``sharpen``: the best token stays the best."""

    key = "sharpen"

    def change(
        self, logits: torch.Tensor, value: float, slot: int, row: int, ctx: LogitsContext
    ) -> None:
        logits *= value
