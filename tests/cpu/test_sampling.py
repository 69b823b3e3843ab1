"""Twins of the kernels that shape logits, and of the chain's rejection sampler."""

import pytest
import torch
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.worker.gpu import structured_outputs
from vllm.v1.worker.gpu.sample import logprob as vllm_logprob

from vllm_griffin.cpu.patches import original
from vllm_griffin.cpu.twins import sampling
from vllm_griffin.cpu.twins.rejection import rejection_sample

VOCAB_SIZES = [33, 1024, 1100]


def rows(vocab_size, count=5):
    generator = torch.Generator().manual_seed(vocab_size + count)
    return 3 * torch.randn(count, vocab_size, generator=generator)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("name", ["apply_temperature", "apply_min_p"])
def test_elementwise_twins_equal_the_kernels(name, vocab_size):
    twin = getattr(sampling, name)
    mapping = torch.tensor([2, 0, 1, 1, 3]).int()
    values = torch.tensor([0.0, 1.0, 0.3, 0.05])
    expected, found = rows(vocab_size), rows(vocab_size)
    original(twin)(expected, mapping, values)
    twin(found, mapping, values)
    assert not torch.equal(found, rows(vocab_size))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("check_all_masked_rows", [False, True])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_logit_bias_equals_the_kernel(vocab_size, check_all_masked_rows):
    """Slots: 0 allowed tokens and bias, 1 nothing, 2 bias and minimum length, 3 the latter and a grammar."""
    tokens = torch.tensor([[3, 30, 7, 0], [1, 1, 1, 1], [5, 2, 9, 0], [5, 2, 9, 0]]).int()
    state = (
        torch.tensor([2, 0, 3, 1, 3, 3]).int(),
        torch.tensor([8, 4, 9, 8, 8, 8]),  # positions; row 2 is long enough to stop
        torch.tensor([3, 0, 0, 0]).int(),
        tokens,
        torch.tensor([2, 0, 3, 0]).int(),
        tokens.flip(1).contiguous(),
        torch.tensor([[2.5, -1.0, 9.0, 0.0]] * 4),
        torch.tensor([0, 0, 10, 10]).int(),
        torch.tensor([0, 0, 2, 3]).int(),
        torch.tensor([0, 0, 0, 1]).int(),
        tokens,
        check_all_masked_rows,
    )
    expected, found = rows(vocab_size, 6), rows(vocab_size, 6)
    for logits in (expected, found):
        logits[5] = float("-inf")
        logits[5, 5] = 1.5  # all that the grammar allows is a stop token
    original(sampling.apply_logit_bias)(expected, *state)
    sampling.apply_logit_bias(found, *state)
    changed = (found != rows(vocab_size, 6)).any(-1)
    assert changed.tolist() == [True, True, False, False, True, True]
    assert torch.equal(found, expected)
    assert torch.isfinite(found[5, 5]) == check_all_masked_rows


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_penalties_equal_the_kernels(vocab_size):
    mapping = torch.tensor([2, 0, 0, 0, 1]).int()
    generator = torch.Generator().manual_seed(1)
    words = -(-vocab_size // 32)
    mask = torch.randint(-(2**31), 2**31, (3, words), generator=generator).int()
    counts = torch.randint(0, 2, (3, vocab_size), generator=generator).int()
    state = (
        mapping,
        torch.tensor([4, 8, 9, 9, 2]).int(),  # token ids of the rows
        torch.tensor([0, 0, 1, 2, 0]).int(),  # number within the request
        torch.tensor([1.3, 1.0, 1.0]),
        torch.tensor([0.2, 0.0, 0.1]),
        torch.tensor([0.5, 0.0, 0.0]),
        mask,
        counts,
    )
    expected, found = rows(vocab_size), rows(vocab_size)
    original(sampling.apply_penalties)(expected, *state)
    sampling.apply_penalties(found, *state)
    assert torch.equal(found[4], rows(vocab_size)[4])
    assert not torch.equal(found[2], rows(vocab_size)[2])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_logprobs_equal_the_kernels(vocab_size):
    logits, tokens = rows(vocab_size), torch.tensor([[0, 3], [5, 5], [32, 1], [2, 9], [1, 8]])
    expected = original(sampling.compute_token_logprobs)(logits, tokens)
    found = sampling.compute_token_logprobs(logits, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(found, logits.log_softmax(-1).gather(1, tokens), rtol=0, atol=2e-6)


def test_ranks_equal_the_kernels():
    logits, tokens = rows(1100).round(), torch.tensor([3, 5, 900, 2, 1])
    results = []
    for kernel in (original(sampling._ranks_kernel), vllm_logprob._ranks_kernel):
        ranks = torch.empty(5, dtype=torch.int64)
        kernel[(5,)](ranks, logits, logits.stride(0), tokens, 1100, BLOCK_SIZE=8192)
        results.append(ranks)
    assert results[0].tolist() == results[1].tolist()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("vocab_size", [*VOCAB_SIZES, 20_000])
@pytest.mark.parametrize("which", ["k", "p", "kp"])
def test_top_k_and_top_p_equal_vllms(which, vocab_size, ties):
    """vLLM's own function for a CPU without Triton; its kernel fails in the interpreter."""
    logits = rows(vocab_size, 9)
    if ties:
        logits = logits.round()
    logits[6, ::2] = float("-inf")
    k = torch.tensor([1, 3, vocab_size, vocab_size, 20, 5, 9, 2, 33]).int()
    p = torch.tensor([1.0, 0.9, 0.5, 1.0, 0.3, 1e-6, 0.7, 0.999, 0.05])
    k, p = (k if "k" in which else None), (p if "p" in which else None)
    expected = apply_top_k_top_p_pytorch(logits.clone(), k, p, allow_cpu_sync=True)
    found = sampling.apply_top_k_top_p(logits.clone(), k, p)
    # Which of several equal values at the cut are kept is left to the sort.
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)
    assert ties or torch.equal(found, expected)
    assert ((found == logits) | (found == float("-inf"))).all()
    assert not torch.equal(found, logits)
    again = sampling.apply_top_k_top_p(
        logits[2:3].clone(), *(None if v is None else v[2:3] for v in (k, p))
    )
    assert torch.equal(again, found[2:3])


def grammar_arguments():
    generator = torch.Generator().manual_seed(5)
    vocab_size, stride = 70, 4
    bitmask = torch.randint(-(2**31), 2**31, (4, 3), generator=generator).int()
    # Two rows of request 1, one of request 0, and one that request 2 does not have.
    mapping = torch.tensor([1 * stride, 1 * stride + 1, 0, 2 * stride + 1]).int()
    cumulative = torch.tensor([0, 1, 3, 4]).int()
    return rows(vocab_size, 4), mapping, cumulative, bitmask, vocab_size, stride


def launch(kernel, logits, mapping, cumulative, bitmask, vocab_size, stride):
    kernel[(len(bitmask), 1)](
        logits,
        logits.stride(0),
        mapping,
        cumulative,
        bitmask,
        bitmask.stride(0),
        vocab_size,
        MASK_STRIDE=stride,
        BLOCK_SIZE=8192,
    )


def test_grammar_bitmask():
    logits, mapping, cumulative, bitmask, vocab_size, stride = grammar_arguments()
    before = logits.clone()
    kernel = structured_outputs._apply_grammar_bitmask_kernel
    launch(kernel, logits, mapping, cumulative, bitmask, vocab_size, stride)
    for row, mask in ((1, 0), (2, 1), (0, 2)):
        for token in range(vocab_size):
            allowed = (int(bitmask[mask, token // 32]) >> (token % 32)) & 1
            assert logits[row, token] == (before[row, token] if allowed else float("-inf"))
    assert torch.equal(logits[3], before[3])


def chains(vocab_size, with_draft_logits):
    """Five requests with 3, 0, 3, 2 and 3 drafts: greedy, no drafts, sampled, greedy, sampled."""
    lengths = torch.tensor([4, 1, 4, 3, 4])
    cumulative = torch.cat((torch.zeros(1).int(), lengths.cumsum(0).int()))
    slots = torch.tensor([3, 0, 5, 1, 4]).int()
    num_logits = int(cumulative[-1])
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 2 * torch.randn(num_logits, vocab_size, generator=generator)
    drafts = torch.randint(0, vocab_size, (num_logits,), generator=generator)
    best = logits.argmax(-1)
    drafts[1:4] = best[0:3]  # all of request 0's drafts are right
    drafts[6:9] = logits[5:8].softmax(-1).multinomial(1, generator=generator)[:, 0]
    drafts[10] = best[9]  # request 3: the first is right, the second a placeholder
    drafts[11] = -1
    drafts[13:16] = best[12:15]
    draft_logits = None
    if with_draft_logits:
        draft_logits = 2 * torch.randn(6, 3, vocab_size, generator=generator)
    return {
        "target_logits": logits,
        "draft_logits": draft_logits,
        "draft_sampled": drafts,
        "cu_num_logits": cumulative,
        "pos": torch.arange(num_logits) + 17,
        "idx_mapping": slots,
        "expanded_idx_mapping": torch.repeat_interleave(slots, lengths),
        "expanded_local_pos": torch.cat([torch.arange(n) for n in lengths]).int(),
        "temperature": torch.tensor([1.0, 0.0, 0.0, 0.0, 0.8, 1.0]),
        "seed": torch.tensor([5, 6, 7, 8, 9, 10]),
        "num_speculative_steps": 3,
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("vocab_size", [40, 1100])
@pytest.mark.parametrize("mode", ["one-hot", "draft logits", "synthetic", "fp64"])
def test_rejection_sampling_equals_the_kernels(seed, vocab_size, mode, monkeypatch):
    if mode == "draft logits":
        use_numpy_log1p(monkeypatch)
    arguments = chains(vocab_size, mode == "draft logits")
    arguments["seed"] = arguments["seed"] + 1000 * seed
    if mode == "synthetic":
        arguments["synthetic_conditional_rates"] = torch.tensor([0.9, 0.6, 0.3])
    arguments["use_fp64"] = mode == "fp64"
    expected, expected_count = original(rejection_sample)(**arguments)
    sampled, count = rejection_sample(**arguments)
    assert count.dtype == expected_count.dtype
    assert count.tolist() == expected_count.tolist()
    for found, wanted, length in zip(sampled, expected, count, strict=True):
        assert found[:length].tolist() == wanted[:length].tolist()
    if mode == "one-hot":
        assert count[0] == 4
        assert count[3] == 2


def use_numpy_log1p(monkeypatch):
    """Triton's interpreter has no libdevice, which the kernel takes log1p from."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils

    class Device:
        @staticmethod
        def log1p(x):
            return tl.core.tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype), x.type)

    monkeypatch.setattr(rejection_sampler_utils, "tldevice", Device)
