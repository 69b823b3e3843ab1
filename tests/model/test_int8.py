"""The draft in 8 bits: what a layer computes, which layers do, and that the network stays what it is."""

import json

import pytest
import torch
from torch import nn

from tests.model.draft_files import CONFIG, random_weights, write_draft
from vllm_griffin.model.int8 import Int8LinearMethod
from vllm_griffin.model.layout import DraftLayout

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="8 bits are for CPUs")

TREE = {"num_speculative_tokens": 4, "tree_depth": 2, "tree_top_k": 2}
INT8 = TREE | {"draft_quantization": "int8"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_a_product_of_integers(dtype, bias):
    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=bias, dtype=dtype)
    x = torch.randn(5, 96, dtype=dtype) * torch.tensor([[1.0], [100.0], [0.01], [3.0], [1.0]])
    x = x.to(dtype)
    with torch.no_grad():
        layer.weight[7] = 0.0
        layer.weight[8] *= 100.0
    weight = layer.weight.detach().float()
    scales = weight.abs().amax(1).clamp(min=1e-30) / 127
    row_scales = x.float().abs().amax(1) / 127
    rows = (x.float() / row_scales[:, None]).round()
    expected = rows @ (weight / scales[:, None]).round().T * row_scales[:, None] * scales
    if bias:
        expected += layer.bias.detach().float()
    method = Int8LinearMethod()
    method.process_weights_after_loading(layer)
    found = method.apply(layer, x, layer.bias)
    assert layer.weight.numel() == 0
    assert found.dtype == dtype
    # Halves may be rounded either way: by one, times a number of at most 127.
    tolerance = row_scales[:, None] * scales * 127 + 1e-2 * expected.abs()
    assert ((found.float() - expected).abs() <= tolerance + 1e-6).all()


def test_a_weight_that_is_kept_may_be_written_again():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(3, 64)
    method = Int8LinearMethod(keep_weight=True)
    method.process_weights_after_loading(layer)
    first = method.apply(layer, x)
    with torch.no_grad():
        layer.weight.neg_()
    method.process_weights_after_loading(layer)
    torch.testing.assert_close(method.apply(layer, x), -first)


@pytest.mark.parametrize("own_head", [False, True])
def test_the_network_is_the_same_but_for_rounding(load, tmp_path, own_head):
    config = CONFIG | ({"draft_vocab_size": 200} if own_head else {})
    folder = write_draft(tmp_path, config, random_weights(CONFIG, DraftLayout()))
    (folder / "vocabulary.json").write_text(json.dumps(list(range(512))))
    draft, quantised = load(folder, tree=TREE), load(folder, tree=INT8)
    torch.manual_seed(0)
    ids, positions = torch.randint(512, (9,)), torch.arange(9)
    hidden = torch.randn(9, 64)
    outputs = []
    for model in (draft, quantised):
        model.layers[0].self_attn.attn.pages = [0]
        predict, regress = model(ids, positions, hidden)
        outputs.append((predict, regress, model.compute_logits(predict)))
    for exact, rounded in zip(*outputs, strict=True):
        difference = (rounded - exact).norm() / exact.norm()
        assert 0 < difference < 0.05
    linear = [
        m
        for m in quantised.modules()
        if isinstance(getattr(m, "quant_method", None), Int8LinearMethod)
    ]
    # up, down; QKV, output; gate and up, down; and the head, if it is the draft's own.
    assert len(linear) == 6 + own_head
    assert quantised.fc.fc.token not in linear and quantised.fc.fc.feature not in linear
    assert (quantised.lm_head is draft.lm_head) == (not own_head)
