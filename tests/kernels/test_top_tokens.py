"""The likeliest tokens of a row: the formula, the torch reference and the Triton kernels agree."""

import math

import pytest
import torch

from vllm_griffin.kernels.top_tokens import PART, top_tokens_reference, top_tokens_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf


def rows_of(num_rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Logits of which no two of a row are equal, so that their order is one."""
    generator = torch.Generator().manual_seed(seed)
    every = torch.arange(vocabulary) / 256 - 20
    assert len(every.unique()) == vocabulary
    order = [torch.randperm(vocabulary, generator=generator) for _ in range(num_rows)]
    rows = [every[i] for i in order] or [every.new_empty(0, vocabulary)]
    return torch.vstack(rows).to(DEVICE)


def same(logits: torch.Tensor, k: int) -> None:
    expected = top_tokens_reference(logits, k)
    found = top_tokens_triton(logits, k)
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-6, equal_nan=True)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("make", [top_tokens_reference, top_tokens_triton])
def test_is_the_formula(make):
    logits = torch.tensor([[1.0, -2.0, 4.0, 0.5, 3.0]], device=DEVICE)
    total = math.log(sum(math.exp(x) for x in logits[0].tolist()))
    logprobs, tokens = make(logits, 3)
    assert tokens.tolist() == [[2, 4, 0]]
    assert logprobs[0].tolist() == pytest.approx([4 - total, 3 - total, 1 - total], abs=1e-6)


@pytest.mark.parametrize("k", [1, 3, 10, 32])
@pytest.mark.parametrize("vocabulary", [32, 500, PART, PART + 1, 3 * PART + 77])
def test_triton_is_the_reference(vocabulary, k):
    same(rows_of(3, vocabulary, seed=vocabulary + k), k)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_probabilities_do_not_depend_on_where_logits_lie(shift):
    """Also beside parts that hold nothing: one of four, and one of -inf alone."""
    logits = rows_of(2, 2 * PART + 77) + shift
    logits[1, :PART] = -INF
    same(logits, 4)


def test_the_vocabulary_of_llama_3():
    same(rows_of(2, 128256), 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_sums_are_float32(dtype):
    # As many different numbers as bfloat16 has between 1 and 2 and their negatives, then far lower ones.
    logits = torch.full((2, PART + 50), -9.0, dtype=dtype, device=DEVICE)
    numbers = 1 + torch.arange(128, device=DEVICE) / 128
    logits[0, 5:133] = numbers.to(dtype)
    logits[1, -128:] = -numbers.to(dtype)
    same(logits, 16)


def test_rows_may_be_parts_of_wider_ones():
    same(rows_of(4, 700)[:, :600], 5)


def test_no_rows():
    logprobs, tokens = top_tokens_triton(rows_of(0, 40), 4)
    assert logprobs.shape == tokens.shape == (0, 4)


def test_of_equal_logits_the_kernel_takes_the_lower_tokens():
    logits = torch.zeros(2, PART + 9, device=DEVICE)
    logits[1, [4, PART + 2, PART + 8]] = 1.0
    tokens = top_tokens_triton(logits, 5)[1].tolist()
    assert tokens == [[0, 1, 2, 3, 4], [4, PART + 2, PART + 8, 0, 1]]


def test_zeros_of_both_signs_and_large_numbers_are_in_order():
    logits = torch.tensor([[-0.0, 3e38, -3e38, 1e-40, -1e-40, 88.0]], device=DEVICE)
    assert top_tokens_triton(logits, 6)[1].tolist() == [[1, 5, 3, 0, 4, 2]]


@pytest.mark.parametrize(
    "extremes", [{}, {7: INF}, {7: INF, PART + 3: INF}, {PART + 1: -INF}], ids=str
)
def test_infinities(extremes):
    """Masked tokens, a masked part, and what a broken model gives."""
    logits = rows_of(1, PART + 20)
    logits[0, 20:PART] = -INF
    for token, value in extremes.items():
        logits[0, token] = value
    expected, found = top_tokens_reference(logits, 4), top_tokens_triton(logits, 4)
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-6, equal_nan=True)
    assert set(found[1][0].tolist()) == set(expected[1][0].tolist())


@pytest.mark.parametrize("broken", [math.nan, -INF])
@pytest.mark.parametrize("make", [top_tokens_reference, top_tokens_triton])
def test_a_row_without_probabilities_gives_nan_at_tokens_of_the_vocabulary(make, broken):
    logits = torch.full((2, PART + 20), broken, device=DEVICE)
    logits[1] = 0.0
    logits[1, 5] = broken
    logprobs, tokens = make(logits, 4)
    assert logprobs[0].isnan().all()
    assert logprobs[1].isnan().all() == math.isnan(broken)
    assert all(len(set(row)) == 4 and max(row) < PART + 20 for row in tokens.tolist())
