"""Twin of ``rejection_sample``, which verifies a chain of draft tokens."""

from dataclasses import dataclass

import torch

from vllm_griffin.cpu.twins.gumbel import gumbel_sample
from vllm_griffin.cpu.twins.noise import uniform


@dataclass(frozen=True)
class _Chain:
    """One request's rows: the drafts and, one longer, the target's logits before and after them."""

    logits: torch.Tensor  # [1 + n, V], after temperature
    drafts: list[int]  # n token ids; -1 is a placeholder
    positions: list[int]  # n or more
    seed: int
    draft_logprobs: torch.Tensor | None  # [n, V]; None: the draft is one-hot
    rates: list[float] | None  # forced acceptance by step, for benchmarks

    def uniform(self, step: int) -> float:
        return uniform(self.seed, self.positions[step])


def rejection_sample(
    target_logits: torch.Tensor,  # [num_logits, V]
    draft_logits: torch.Tensor | None,  # [max_num_reqs, num_speculative_steps, V]
    draft_sampled: torch.Tensor,  # [num_logits]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    pos: torch.Tensor,  # [num_logits]
    idx_mapping: torch.Tensor,  # [num_reqs]
    expanded_idx_mapping: torch.Tensor,  # [num_logits]
    expanded_local_pos: torch.Tensor,  # [num_logits]
    temperature: torch.Tensor,  # [max_num_reqs]
    seed: torch.Tensor,  # [max_num_reqs]
    num_speculative_steps: int,
    synthetic_conditional_rates: torch.Tensor | None = None,  # [num_speculative_steps]
    use_fp64: bool = False,
    use_block_verification: bool = False,
    contexts: torch.Tensor | None = None,
    watermarking: torch.Tensor | None = None,
    watermarking_skip_mask: torch.Tensor | None = None,
    watermark_key: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepts drafts up to the first rejected one and draws the token after them.

    Greedy requests accept the target's argmax; the others follow Leviathan et al. (2023).
    Block verification and watermarks stay with vLLM's kernels.

    Returns:
        ``[num_reqs, 1 + num_speculative_steps]`` tokens, and how many of each row count.

    """
    if use_block_verification or contexts is not None:
        from vllm_griffin.cpu.patches import original

        return original(rejection_sample)(
            target_logits,
            draft_logits,
            draft_sampled,
            cu_num_logits,
            pos,
            idx_mapping,
            expanded_idx_mapping,
            expanded_local_pos,
            temperature,
            seed,
            num_speculative_steps,
            synthetic_conditional_rates,
            use_fp64,
            use_block_verification,
            contexts,
            watermarking,
            watermarking_skip_mask,
            watermark_key,
        )
    num_reqs = idx_mapping.shape[0]
    vocab_size = target_logits.shape[1]
    if draft_logits is not None:
        # A padded target vocabulary may be wider than the draft's.
        vocab_size = min(vocab_size, draft_logits.shape[-1])
    bounds: list[int] = cu_num_logits.tolist()
    tokens: list[int] = draft_sampled.tolist()
    positions: list[int] = pos.tolist()
    rates = None if synthetic_conditional_rates is None else synthetic_conditional_rates.tolist()

    sampled = torch.zeros(num_reqs, num_speculative_steps + 1, dtype=torch.int64)
    num_accepted = torch.zeros(num_reqs, dtype=torch.int32)
    residuals = torch.empty(num_reqs, vocab_size, dtype=torch.float32)
    last_rows = []
    for request, slot in enumerate(idx_mapping.tolist()):
        start, end = bounds[request], bounds[request + 1]
        temp = float(temperature[slot])
        chain = _Chain(
            logits=target_logits[start:end, :vocab_size].float(),
            drafts=tokens[start + 1 : end],
            positions=positions[start:end],
            seed=int(seed[slot]),
            draft_logprobs=_draft_logprobs(draft_logits, slot, end - start - 1, vocab_size, temp),
            rates=rates,
        )
        accepted = _accept_greedy(chain) if temp == 0.0 else _accept_sampled(chain)
        sampled[request, :accepted] = torch.tensor(chain.drafts[:accepted], dtype=torch.int64)
        num_accepted[request] = accepted
        residuals[request] = _residual(chain, accepted, greedy=temp == 0.0)
        last_rows.append(start + accepted)

    last = torch.tensor(last_rows, dtype=torch.int64)
    drawn = gumbel_sample(
        residuals,
        expanded_idx_mapping[last],
        temperature,
        seed,
        pos[last],
        apply_temperature=False,
        is_drafting=False,
        use_fp64=use_fp64,
    )
    sampled.scatter_(1, num_accepted.long()[:, None], drawn[:, None])
    return sampled, num_accepted + 1


def _draft_logprobs(
    draft_logits: torch.Tensor | None, slot: int, steps: int, vocab_size: int, temp: float
) -> torch.Tensor | None:
    # Stored before temperature.
    if draft_logits is None or temp == 0.0:
        return None
    return (draft_logits[slot, :steps, :vocab_size].float() / temp).log_softmax(-1)


def _accept_greedy(chain: _Chain) -> int:
    best = chain.logits[:-1].argmax(dim=-1).tolist()
    for step, (draft, token) in enumerate(zip(chain.drafts, best, strict=True)):
        agrees = draft == token if chain.rates is None else chain.uniform(step) < chain.rates[step]
        if draft < 0 or not agrees:
            return step
    return len(chain.drafts)


def _accept_sampled(chain: _Chain) -> int:
    """Accepts x while p(x) > u q(x)."""
    logprobs = chain.logits[:-1].log_softmax(-1)
    for step, draft in enumerate(chain.drafts):
        if draft < 0:
            return step
        u = torch.tensor(chain.uniform(step))
        if chain.rates is not None:
            accepted = bool(u < chain.rates[step])
        else:
            bar = u.log()
            if chain.draft_logprobs is not None:
                bar = bar + chain.draft_logprobs[step, draft]
            accepted = bool(logprobs[step, draft] > bar)
        if not accepted:
            return step
    return len(chain.drafts)


def _residual(chain: _Chain, accepted: int, greedy: bool) -> torch.Tensor:
    """Logits ``[V]`` of what a rejected draft leaves, ``max(p - q, 0)``; without one, the target's.

    For a one-hot draft that is the target without the rejected token.
    """
    row = chain.logits[accepted]
    if greedy or accepted == len(chain.drafts) or chain.drafts[accepted] < 0:
        return row
    if chain.draft_logprobs is None:
        row = row.clone()
        row[chain.drafts[accepted]] = float("-inf")
        return row
    logprobs = row.log_softmax(-1)
    ratio = (chain.draft_logprobs[accepted] - logprobs).exp()
    return torch.where(ratio < 1.0, logprobs + torch.log1p(-ratio), float("-inf"))
