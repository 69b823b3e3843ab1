"""Twins of the kernels that read a request's text: bad words and the thinking budget."""

import pytest
import torch

from vllm_griffin.cpu.patches import original
from vllm_griffin.cpu.twins.history import apply_bad_words, apply_thinking_budget

VOCABULARY, REQUESTS, ROWS = 40, 5, (1, 4, 6, 2, 5)


def texts(seed: int) -> dict[str, torch.Tensor]:
    """Committed texts of few different tokens, and rows of drafts, in slots 4 .. 0."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.arange(REQUESTS).flip(0)
    rows = torch.tensor(ROWS)
    prompt = torch.randint(1, 4, (REQUESTS,), generator=generator)
    total = prompt + torch.randint(1, 9, (REQUESTS,), generator=generator)
    return {
        "slots": slots.int(),
        "mapping": slots.repeat_interleave(rows).int(),
        "local": torch.cat([torch.arange(n) for n in ROWS]).int(),
        "input_ids": torch.randint(0, 4, (sum(ROWS),), generator=generator).int(),
        "all_token_ids": torch.randint(0, 4, (REQUESTS, 16), generator=generator).int(),
        "prompt_len": prompt.int(),
        "total_len": total.int(),
    }


@pytest.mark.parametrize("seed", range(8))
def test_bad_words_equal_the_kernel(seed: int) -> None:
    t = texts(seed)
    # Five words, of 1, 2, 3, 2 and 4 tokens.
    words = [9, 0, 8, 1, 2, 7, 3, 3, 2, 0, 1, 6]
    offsets = torch.tensor([0, 1, 3, 6, 8, 12]).int().repeat(REQUESTS, 1)
    state = (
        torch.tensor(words).int().repeat(REQUESTS, 1),
        offsets,
        torch.tensor([5, 0, 3, 5, 2]).int(),
        t["all_token_ids"],
        t["prompt_len"],
        t["total_len"],
        t["input_ids"],
        t["local"],
        5,
    )
    expected, found = (torch.zeros(sum(ROWS), VOCABULARY) for _ in range(2))
    original(apply_bad_words)(expected, t["mapping"], *state)
    apply_bad_words(found, t["mapping"], *state)
    assert torch.equal(found, expected)
    assert (found[t["mapping"] == 1] == 0).all()
    assert torch.isinf(found[:, 6:9]).any()  # a word of several tokens


@pytest.mark.parametrize("start", [[1], [1, 0]])
@pytest.mark.parametrize("end", [[2], [3, 2]])
def test_the_thinking_budget_equals_the_kernel(start: list[int], end: list[int]) -> None:
    forced_tokens = set()
    for seed in range(8):
        t = texts(seed)
        caches = [torch.full((REQUESTS,), v).int() for v in (-1, -1, 0)]
        state = (
            torch.tensor([0, 3, -1, 1, 2]).int(),
            t["all_token_ids"],
            t["total_len"],
            t["input_ids"],
            t["local"],
            *caches,
            torch.tensor(start).int(),
            torch.tensor(end).int(),
            torch.tensor([0, 3, 0, 9]).int(),
        )
        expected, found = (torch.zeros(sum(ROWS), VOCABULARY) for _ in range(2))
        original(apply_thinking_budget)(expected, t["slots"], t["mapping"], *state)
        apply_thinking_budget(found, t["slots"], t["mapping"], *state)
        assert torch.equal(found, expected)
        assert (found[t["mapping"] == 2] == 0).all()
        forced_tokens |= set(found.nonzero()[:, 1].tolist())
    assert forced_tokens == {0, 3, 9}
