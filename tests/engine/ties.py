"""How close the plain engine's decisions were, so that a difference can be shown to be a tie."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import SamplingStates

from tests.engine.harness import NEAR_TIE, Outcome, Request
from vllm_griffin.cpu.twins.noise import gumbel_noise
from vllm_griffin.runner.trace import client_request_id


@contextlib.contextmanager
def recorded_gaps() -> Iterator[dict[tuple[str, int], float]]:
    """(request name, position) -> distance of the decision there from another one.

    The least of: best against second best after temperature and noise; last kept against first
    dropped at the top-k cut; cumulative probability against the bound at the top-p cut; the nearest
    logit against the min-p cut.
    """
    gaps: dict[tuple[str, int], float] = {}
    draw, cut = Sampler._sample_random, SamplingStates.apply_min_p
    min_p_gaps: list[list[float]] = []

    def cutting(
        self: SamplingStates, logits: torch.Tensor, mapping: torch.Tensor, mapping_np: Any
    ) -> None:
        bounds = logits.amax(-1, keepdim=True) + self.min_p.gpu[mapping].log()[:, None]
        min_p_gaps[:] = [(logits - bounds).abs().nan_to_num(nan=math.inf).amin(-1).tolist()]
        cut(self, logits, mapping, mapping_np)

    def recording(
        self: Sampler,
        logits: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        idx_mapping_np: Any,
        pos: torch.Tensor,
        top_k: torch.Tensor | None,
        top_p: torch.Tensor | None,
        use_fused_sampler: bool,
    ) -> Any:
        sampled, processed = draw(
            self,
            logits.clone(),
            expanded_idx_mapping,
            idx_mapping_np,
            pos,
            top_k,
            top_p,
            use_fused_sampler,
        )
        states = self.sampling_states
        # A step without any processing has no min-p cut, and leaves none behind.
        min_p = min_p_gaps.pop() if min_p_gaps else None
        for row, slot in enumerate(expanded_idx_mapping.tolist()):
            position = int(pos[row])
            scores = processed[row].float().clone()
            if states.temperature.np[slot] > 0:
                seed = int(states.seeds.np[slot])
                scores += torch.from_numpy(gumbel_noise(seed, position, len(scores)))
            best, second = scores.topk(2).values.tolist()
            found = [best - second]
            if top_k is not None:
                found.append(_top_k_gap(logits[row].float(), int(top_k[row])))
            if top_p is not None:
                found.append(_top_p_gap(logits[row].float(), float(top_p[row])))
            if min_p is not None:
                found.append(min_p[row])
            name = client_request_id(self.req_states.index_to_req_id[slot])
            # Between two masked tokens there is no distance.
            gaps[name, position] = min(gap for gap in found if not math.isnan(gap))
        return sampled, processed

    with (
        mock.patch.object(Sampler, "_sample_random", recording),
        mock.patch.object(SamplingStates, "apply_min_p", cutting),
    ):
        yield gaps


def _top_k_gap(logits: torch.Tensor, k: int) -> float:
    if not 0 < k < len(logits):
        return float("inf")
    kept, dropped = logits.topk(k + 1).values[-2:].tolist()
    return kept - dropped


def _top_p_gap(logits: torch.Tensor, p: float) -> float:
    if p >= 1:
        return float("inf")
    cumulative = logits.softmax(-1).sort().values.cumsum(-1)
    return float((cumulative - (1 - p)).abs().min())


def assert_lossless(
    requests: list[Request],
    plain: Outcome,
    gaps: dict[tuple[str, int], float],
    other: Outcome,
) -> int:
    """Equal outputs, or a first difference at a near-tie. Returns how many were excused."""
    assert set(other.tokens) == {r.name for r in requests}
    excused = 0
    for request in requests:
        expected, found = plain.tokens[request.name], other.tokens[request.name]
        if expected == found:
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
            min(len(expected), len(found)),
        )
        gap = gaps[request.name, len(request.prompt) + at - 1]
        assert gap < NEAR_TIE, (
            f"{request.name} ({len(request.prompt)} prompt tokens, {request.params}) differs at "
            f"output {at}, where the plain engine's gap is {gap:.2e}: {expected} != {found}"
        )
        print(f"excused: {request.name} at output {at}, gap {gap:.2e}")
        excused += 1
    return excused
