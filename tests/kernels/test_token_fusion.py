"""Fusion norms: the formula written out, the torch reference and the Triton kernel agree."""

import pytest
import torch

from vllm_griffin.kernels.token_fusion import fusion_norms_reference, fusion_norms_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts where a GPU rounds to bfloat16: three roundings may differ by one unit each.
TOLERANCES = [
    (torch.float32, 1e-6, 1e-6),
    (torch.bfloat16, 1e-2, 2.4e-2),
    (torch.float16, 1e-3, 3e-3),
]


def inputs(num_tokens: int, hidden: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(hidden)
    a, e = torch.randn(num_tokens, hidden) * 3, torch.randn(num_tokens, hidden) * 0.02
    weights = torch.rand(2, hidden) + 0.5
    return [x.to(DEVICE, dtype) for x in (a, e, *weights)]


def norm_by_hand(x: list[float], weight: list[float], eps: float) -> list[float]:
    rms = (sum(v * v for v in x) / len(x) + eps) ** 0.5
    return [w * v / rms for v, w in zip(x, weight, strict=True)]


def test_reference_is_the_formula():
    a, e, post, shared = inputs(3, 5, torch.float32)
    out = fusion_norms_reference(a, e, post, shared, 1e-5)
    for i in range(3):
        fused = norm_by_hand(
            norm_by_hand(a[i].tolist(), post.tolist(), 1e-5), shared.tolist(), 1e-5
        )
        token = norm_by_hand(e[i].tolist(), shared.tolist(), 1e-5)
        torch.testing.assert_close(out[i].cpu(), torch.tensor([*fused, *token]))


def test_rounds_before_the_weight_as_hugging_face_does():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    a, e, post, shared = inputs(4, 64, torch.bfloat16)
    norms = {}
    for name, weight in (("post", post), ("shared", shared)):
        norms[name] = LlamaRMSNorm(64, 1e-6).to(DEVICE, torch.bfloat16)
        norms[name].weight.data.copy_(weight)
    expected = torch.cat([norms["shared"](norms["post"](a)), norms["shared"](e)], dim=-1)
    assert torch.equal(fusion_norms_reference(a, e, post, shared, 1e-6), expected)


@pytest.mark.parametrize("hidden", [32, 576, 3584])
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
def test_triton_is_the_reference(hidden, dtype, atol, rtol):
    x = inputs(3, hidden, dtype)
    expected = fusion_norms_reference(*x, 1e-5)
    torch.testing.assert_close(fusion_norms_triton(*x, 1e-5), expected, atol=atol, rtol=rtol)


def test_triton_rounds_before_the_weight_too():
    # The interpreter rounds to float16 as a GPU does; one rounding less changes a third.
    x = inputs(8, 576, torch.float16)
    equal = fusion_norms_triton(*x, 1e-5) == fusion_norms_reference(*x, 1e-5)
    assert equal.float().mean() > 0.99


def test_rows_may_be_strided():
    a, e, post, shared = inputs(4, 96, torch.float32)
    wide = torch.cat([a, e], dim=1)
    expected = fusion_norms_reference(a, e, post, shared, 1e-6)
    actual = fusion_norms_triton(wide[:, :96], wide[:, 96:], post, shared, 1e-6)
    torch.testing.assert_close(actual, expected)


def test_no_tokens():
    a, e, post, shared = inputs(0, 32, torch.float32)
    assert fusion_norms_triton(a, e, post, shared, 1e-6).shape == (0, 64)
