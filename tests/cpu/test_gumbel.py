"""gumbel_sample and its noise against vLLM's kernels in the interpreter: equal, bit by bit."""

import pytest
import torch
from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample import gumbel as vllm_gumbel

from vllm_griffin.cpu.patches import original
from vllm_griffin.cpu.twins.gumbel import gumbel_sample
from vllm_griffin.cpu.twins.noise import gumbel_noise, uniform

SEEDS = [0, -1, 7, 2**31, -(2**63), 123456789012345]


@triton.jit
def _noise_kernel(out_ptr, seed_ptr, pos, size, FP64: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    position = seed * 0 + pos
    if FP64:
        u = vllm_gumbel.murmur3_uniform64(seed, position, offsets)
        noise = -tl.log(-tl.log(u))
    else:
        u = vllm_gumbel.murmur3_uniform32(seed, position, offsets)
        noise = -tl.log(-vllm_gumbel._log1p_neg_stable(u))
    tl.store(out_ptr + offsets, noise, mask=offsets < size)


@triton.jit
def _uniform_kernel(out_ptr, seed_ptr, pos_ptr):
    u = vllm_gumbel.tl_rand32(tl.load(seed_ptr), tl.load(pos_ptr), includes_zero=False)
    tl.store(out_ptr, u)


@pytest.mark.parametrize("fp64", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_noise_equals_the_kernels(seed, fp64):
    size = 1000
    out = torch.empty(size, dtype=torch.float64 if fp64 else torch.float32)
    for position in (0, 5, 2**31 + 3):
        _noise_kernel[(1,)](out, torch.tensor([seed]), position, size, FP64=fp64, BLOCK=1024)
        twin = torch.from_numpy(gumbel_noise(seed, position, size, fp64=fp64))
        assert twin.dtype == out.dtype
        assert torch.equal(twin, out)


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_equals_the_kernels(seed):
    out = torch.empty(1)
    for position in (0, 1, 77, 2**33 + 5):
        _uniform_kernel[(1,)](out, torch.tensor([seed]), torch.tensor([position]))
        assert uniform(seed, position) == out.item()


def test_noise_is_standard_gumbel():
    noise = torch.from_numpy(gumbel_noise(3, 11, 200_000))
    assert abs(noise.mean().item() - 0.5772) < 0.02
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.05


def test_drafts_draw_from_another_stream():
    assert (gumbel_noise(3, 11, 100, drafting=True) != gumbel_noise(3, 11, 100)).all()


def batch(vocab_size, dtype=torch.float32, rows=9, slots=6):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (4 * torch.randn(rows, vocab_size, generator=generator)).to(dtype)
    return {
        "logits": logits,
        # Shared slots and positions, as the rows of a tree have them, and rows without a request.
        "expanded_idx_mapping": torch.tensor([0, 0, 0, 3, -1, 5, 5, 2, -1][:rows]).int(),
        "temperature": torch.tensor([0.7, 1.0, 0.0, 1.3, 1.0, 1.0][:slots]),
        "seed": torch.tensor(SEEDS[:slots]),
        "pos": torch.tensor([4, 5, 5, 0, 0, 900, 901, 3, 1][:rows]),
    }


@pytest.mark.parametrize("vocab_size", [1, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fp64", [False, True])
@pytest.mark.parametrize(("drafting", "apply_temperature"), [(False, False), (True, True)])
def test_samples_equal_the_kernels(vocab_size, dtype, fp64, drafting, apply_temperature):
    arguments = batch(vocab_size, dtype) | {
        "apply_temperature": apply_temperature,
        "is_drafting": drafting,
        "use_fp64": fp64,
    }
    expected = original(gumbel_sample)(**arguments)
    sampled = gumbel_sample(**arguments)
    assert sampled.dtype == expected.dtype
    assert sampled.tolist() == expected.tolist()


def test_masked_rows_equal_the_kernels():
    arguments = batch(2000) | {"apply_temperature": False, "is_drafting": False}
    arguments["logits"][:, torch.arange(2000) % 50 != 3] = float("-inf")
    arguments["logits"][4] = float("-inf")
    assert gumbel_sample(**arguments).tolist() == original(gumbel_sample)(**arguments).tolist()


@pytest.mark.parametrize("per_token", [False, True])
def test_logits_cache(per_token):
    """Not against the kernel: it fails in the interpreter where it stores logits."""
    arguments = batch(1500) | {"apply_temperature": True, "is_drafting": True}
    mapping = [1, 0, -1, 3, -1, 5, 4, 2, -1]
    arguments["expanded_idx_mapping"] = torch.tensor(mapping).int()
    columns = [0, 2, 1, 1, 0, 2, 0, 1, 2] if per_token else [1] * 9
    column = torch.tensor(columns) if per_token else torch.tensor(1)
    cache = torch.full((6, 3, 1600), 9.0)
    sampled = gumbel_sample(**arguments, logits_cache=cache, logits_cache_col=column)
    expected = torch.full_like(cache, 9.0)
    for row, (slot, target) in enumerate(zip(mapping, columns, strict=True)):
        if slot >= 0:
            expected[slot, target, :1500] = arguments["logits"][row]
    assert torch.equal(cache, expected)
    assert sampled.tolist() == gumbel_sample(**arguments).tolist()


def test_source_without_cache_is_refused():
    arguments = batch(10) | {"apply_temperature": True, "is_drafting": True}
    with pytest.raises(ValueError, match="logits_cache_source"):
        gumbel_sample(**arguments, logits_cache_source=arguments["logits"])
