"""The settings of a training run."""

from dataclasses import dataclass, field


@dataclass
class Settings:
    """Everything that decides a run's result besides the data and the target.

    `stages` are (passes, optimiser steps) in order. Weights: `feature_weight` of the smooth-L1 loss,
    `token_weight` of the soft cross-entropy, `top_weight` of the top-10 term (stages of several passes
    only). `align_top_k` is the k of the alignment mask, 0 for no mask. `vocabulary` is how many of the
    most frequent tokens the losses look at, 0 for all. `noise` is the width of uniform noise on input
    features at 512 tokens.
    """

    stages: list[tuple[int, int]] = field(default_factory=lambda: [(1, 1000)])
    batch_tokens: int = 4096
    optimiser: str = "muon"
    lr: float = 1e-3
    muon_lr: float = 0.02
    warmup: int = 20
    decay: float = 0.6
    clip: float = 1.0
    feature_weight: float = 1.0
    token_weight: float = 0.1
    top_weight: float = 0.5
    align_top_k: int = 3
    vocabulary: int = 8192
    noise: float = 0.2
    prompt_loss: bool = False
    seed: int = 0
    validate_every: int = 100
    validate_documents: int = 24
    save_every: int = 50

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(steps for _, steps in self.stages)

    def passes_at(self, step: int) -> int:
        """Passes of the stage that optimiser step `step` (from 0) belongs to."""
        for passes, steps in self.stages:
            if step < steps:
                return passes
            step -= steps
        return self.stages[-1][0]
