"""Fusion norms: the formula written out, torch reference, Triton kernel and the form for CPUs agree."""

import pytest
import torch

from vllm_griffin.kernels.token_fusion import fusion_norms_reference, fusion_norms_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts where a GPU rounds to bfloat16: three roundings of a norm may differ by one unit each.
TOLERANCES = [
    (torch.float32, 1e-6, 1e-6),
    (torch.bfloat16, 1e-2, 2.4e-2),
    (torch.float16, 1e-3, 3e-3),
]


def inputs(num_tokens: int, hidden: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The embedding's part of the first product, the feature's, the embedding, and two norms."""
    torch.manual_seed(hidden)
    token, feature = torch.randn(num_tokens, hidden), torch.randn(num_tokens, hidden) * 3
    e, weights = torch.randn(num_tokens, hidden) * 0.02, torch.rand(2, hidden) + 0.5
    return [x.to(DEVICE, dtype) for x in (token, feature, e, *weights)]


def norm_by_hand(x: list[float], weight: list[float], eps: float) -> list[float]:
    rms = (sum(v * v for v in x) / len(x) + eps) ** 0.5
    return [w * v / rms for v, w in zip(x, weight, strict=True)]


def test_reference_is_the_formula():
    token, feature, e, post, shared = inputs(3, 5, torch.float32)
    out = fusion_norms_reference(token, feature, e, post, shared, 1e-5)
    for i in range(3):
        a = [x + y for x, y in zip(token[i].tolist(), feature[i].tolist(), strict=True)]
        once = norm_by_hand(a, post.tolist(), 1e-5)
        twice = norm_by_hand(once, shared.tolist(), 1e-5)
        other = norm_by_hand(e[i].tolist(), shared.tolist(), 1e-5)
        torch.testing.assert_close(out.fused[i].cpu(), torch.tensor(a))
        torch.testing.assert_close(out.pair[i].cpu(), torch.tensor([*twice, *other]))


def test_rounds_before_the_weight_as_hugging_face_does():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    token, feature, e, post, shared = inputs(4, 64, torch.bfloat16)
    norms = {}
    for name, weight in (("post", post), ("shared", shared)):
        norms[name] = LlamaRMSNorm(64, 1e-6).to(DEVICE, torch.bfloat16)
        norms[name].weight.data.copy_(weight)
    a = token + feature
    expected = torch.cat([norms["shared"](norms["post"](a)), norms["shared"](e)], dim=-1)
    out = fusion_norms_reference(token, feature, e, post, shared, 1e-6)
    assert torch.equal(out.fused, a)
    assert torch.equal(out.pair, expected)


@pytest.mark.parametrize("hidden", [32, 576, 3584])
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
def test_triton_is_the_reference(hidden, dtype, atol, rtol):
    x = inputs(3, hidden, dtype)
    expected = fusion_norms_reference(*x, 1e-5)
    torch.testing.assert_close(
        tuple(fusion_norms_triton(*x, 1e-5)), tuple(expected), atol=atol, rtol=rtol
    )


def test_triton_rounds_before_the_weight_too():
    # The interpreter rounds to float16 as a GPU does; one rounding less changes a third.
    x = inputs(8, 576, torch.float16)
    found, expected = fusion_norms_triton(*x, 1e-5), fusion_norms_reference(*x, 1e-5)
    assert torch.equal(found.fused, expected.fused)
    assert (found.pair == expected.pair).float().mean() > 0.99


def test_rows_may_be_strided():
    *rows, post, shared = inputs(4, 96, torch.float32)
    expected = fusion_norms_reference(*rows, post, shared, 1e-6)
    strided = torch.cat(rows, dim=1).split(96, dim=1)
    actual = fusion_norms_triton(*strided, post, shared, 1e-6)
    torch.testing.assert_close(tuple(actual), tuple(expected))


def test_no_tokens():
    x = inputs(0, 32, torch.float32)
    assert [len(x) for x in fusion_norms_triton(*x, 1e-6)] == [0, 0]


@pytest.mark.skipif(DEVICE != "cpu", reason="vLLM's kernels for CPUs")
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCES)
def test_the_form_for_cpus_is_the_reference(num_tokens, dtype, atol, rtol):
    from vllm_griffin.kernels.token_fusion_cpu import fusion_norms_cpu

    x = inputs(num_tokens, 576, dtype)
    expected = fusion_norms_reference(*x, 1e-5)
    torch.testing.assert_close(
        tuple(fusion_norms_cpu(*x, 1e-5)), tuple(expected), atol=atol, rtol=rtol
    )
