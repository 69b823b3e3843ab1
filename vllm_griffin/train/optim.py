"""Optimisers and learning rate: AdamW, or Muon for the matrices with AdamW for the rest.

`torch.optim.Muon` orthogonalises in bfloat16, which CPUs without bfloat16 units compute a hundred times
slower than float32; this one stays in the parameters' own type. A parameter with the attribute
`block_dim` joins two matrices along that dimension (fusion inputs, two-headed outputs); they are
orthogonalised one by one, which is also cheaper.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Newton-Schulz coefficients of Muon (Jordan et al., 2024): singular values go to about 1 in five steps.
_A, _B, _C = 3.4445, -4.7750, 2.0315
STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearest matrices with equal singular values, roughly: [b, m, n] -> [b, m, n].

    X_{k+1} = P_k X_k with P_k = a + b R_k + c R_k^2 and R_k = X_k X_k^T. All P_k are polynomials of R_0, so
    only their product and R_k = P_{k-1} R_{k-1} P_{k-1} are iterated, on the short side.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.transpose(1, 2)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    gram = x @ x.transpose(1, 2)
    product: Tensor | None = None
    for k in range(STEPS):
        factor = _B * gram + _C * gram @ gram
        factor.diagonal(dim1=1, dim2=2).add_(_A)
        product = factor if product is None else factor @ product
        if k + 1 < STEPS:
            gram = factor @ gram @ factor
    assert product is not None
    out = product @ x
    return out if wide else out.transpose(1, 2)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Muon), for 2-D parameters."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]  # noqa: ANN001
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "buffer" not in state:
                    state["buffer"] = torch.zeros_like(p)
                buffer = state["buffer"].lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(buffer, group["momentum"])
                dim = getattr(p, "block_dim", None)
                blocks = direction[None] if dim is None else torch.stack(direction.chunk(2, dim))
                rows, columns = blocks.shape[1:]
                update = orthogonalise(blocks) * max(1.0, rows / columns) ** 0.5
                whole = update[0] if dim is None else torch.cat(list(update), dim)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(whole, alpha=-group["lr"])


def make_optimisers(
    network: nn.Module, kind: str, lr: float, muon_lr: float
) -> list[torch.optim.Optimizer]:
    """Optimisers over the trainable parameters: `kind` is "adamw" or "muon" (matrices) + AdamW (rest)."""
    trained = [p for p in network.parameters() if p.requires_grad]
    if kind == "adamw":
        return [torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95))]
    if kind != "muon":
        raise ValueError(f"optimiser {kind!r} is not one of adamw, muon")
    return [
        Muon([p for p in trained if p.ndim == 2], lr=muon_lr),
        torch.optim.AdamW([p for p in trained if p.ndim != 2], lr=lr, betas=(0.9, 0.95)),
    ]


def schedule(step: int, total: int, warmup: int, decay: float) -> float:
    """Factor on the learning rate: linear warm-up, level, then linear to 0 over the last `decay` part."""
    cooling = max(1.0, total * decay)
    return max(0.0, min(1.0, (step + 1) / max(1, warmup), (total - step) / cooling))
