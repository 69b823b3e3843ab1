"""A draft's linear layers in 8 bits, for CPUs, where reading weights is much of a draft step.

Weights are rounded once, with a scale for each output; activations in each call, with one for each row.
The target verifies with its own weights, so this changes no output, only what is accepted. The layer over
(embedding, feature) stays as it is: a few numbers of a feature are so large that a common scale leaves little
of the others, and the embedding's part by itself is little to read.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

LARGEST = 127
# Primitives that oneDNN keeps for layers of one shape, one for each number of rows; vLLM's own have as many.
PRIMITIVES = 32


class Int8LinearMethod(UnquantizedLinearMethod):
    """Loads weights as they are and multiplies them as 8-bit integers.

    Args:
        keep_weight: For a layer whose weight is written to, and processed, again.
    """

    def __init__(self, keep_weight: bool = False) -> None:
        super().__init__()
        self.keep_weight = keep_weight

    def process_weights_after_loading(self, layer: Any) -> None:
        """Rounds the layer's weight [N, K] and hands it to oneDNN in an order of its own."""
        weight = layer.weight.data
        largest = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True)).float()
        # A row of zeros has no largest number. oneDNN reads the scales where they lie in every call.
        layer.weight_scales = largest.clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        rounded = (weight / layer.weight_scales).round_().to(torch.int8)
        layer.packed_weight = ops.create_onednn_scaled_mm(
            rounded.t(), layer.weight_scales, weight.dtype, True, False, PRIMITIVES
        )
        if not self.keep_weight:
            layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, K] -> [T, N]."""
        rows, row_scales, _ = ops.onednn_scaled_int8_quant(x.contiguous())
        out = x.new_empty(x.shape[0], layer.packed_weight.n)
        return ops.onednn_scaled_mm(layer.packed_weight, rows, out, row_scales, None, None, bias)
