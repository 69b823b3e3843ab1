"""The settings of a training run, and the presets: what each published method is in these terms.

This module knows no torch, so that the command line's help can tell the defaults.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

# The paper's or the published code's reading of the alignment mask (`align`) and of attention (`passes`).
Reading = Literal["paper", "published"]
AttentionForm = Literal["proper", "published"]
AveragingSet = Literal["draft", "vocabulary"]


@dataclass(frozen=True)
class Objective:
    """Weights of what compares p, the target's next-token distribution, with the draft's q, per slot.

    `token`: soft cross-entropy -sum_v p_v log q_v.
    `top`: HASS's term, the same over the ten best tokens of p, not renormalised.
    `tvd`: total variation distance 1 - sum_v min(p_v, q_v), which is the chance of rejection.
    `tvd_plus`: TVD++ (Goel et al., arXiv 2403.00858), the policy gradient of TVD with a normalised reward
        A = (r - mean) / std, r_v = 1 where q_v is not above p_v: -sum_v q_v A_v log q_v, q_v A_v constant.
    `tvd_plus_set`: over what mean and deviation are taken, which the paper leaves open: "draft" weighs
        tokens by q; "vocabulary" takes all alike, in the sum as well: -mean_v A_v log q_v.
    """

    token: float = 0.1
    top: float = 0.5
    tvd: float = 0.0
    tvd_plus: float = 0.0
    tvd_plus_set: AveragingSet = "draft"

    def __post_init__(self) -> None:
        if self.tvd_plus_set not in get_args(AveragingSet):
            raise ValueError(
                f"TVD++ set {self.tvd_plus_set!r} is not one of {', '.join(get_args(AveragingSet))}"
            )

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that have a weight."""
        weights = {
            "cross_entropy": self.token,
            "top_ten": self.top,
            "tvd": self.tvd,
            "tvd_plus": self.tvd_plus,
        }
        return tuple(name for name, weight in weights.items() if weight)


@dataclass
class Settings:
    """Everything that decides a run's result besides the data and the target.

    Attributes:
        stages: (passes, optimiser steps) in order. Each stage has a schedule and an optimiser state of its
            own, as published, where each is a run of its own.
        fusion, two_heads: Token-guided fusion (TGF) and token-enhanced head (TEH) of a new draft.
        align_top_k: The k of the alignment mask; 0: no mask (HASS).
        mask, attention: The paper's or the published code's readings, see `align` and `passes`.
        feature_weight: Of the smooth-L1 loss on `regress`.
        token_weight, top_weight, tvd_weight, tvd_plus_weight, tvd_plus_set: See `Objective`; the
            top-10 term is left out of one-pass stages.
        vocabulary: How many of the most frequent tokens the losses look at; 0: all.
        prompt_loss: Train on prompts as on answers.
        noise: Width of the uniform noise on input features, at 512 tokens.
        batch_tokens: Slots of a step, of all processes together.
        optimiser: "muon" (matrices; AdamW for the rest) or "adamw".
        lr, muon_lr: Learning rates of AdamW and of Muon.
        later_lr: Factor on both after the first stage.
        warmup: Steps of linear warm-up, in each stage.
        decay: Last part of each stage, over which the rate goes linearly to 0.
        clip, clip_value: Bound on the gradient's norm and on each of its elements; 0: none.
        bf16: Compute in bfloat16 where it is safe (autocast).
        gradient_checkpointing: Compute activations again in the backward pass, for less memory.
        validate_every, validate_documents, save_every: Steps between validations, how many held-out documents
            they look at, steps between checkpoints.
    """

    stages: list[tuple[int, int]] = field(default_factory=lambda: [(1, 1000)])
    fusion: bool = True
    two_heads: bool = True
    align_top_k: int = 3
    mask: Reading = "paper"
    attention: AttentionForm = "proper"
    feature_weight: float = 1.0
    token_weight: float = 0.1
    top_weight: float = 0.5
    tvd_weight: float = 0.0
    tvd_plus_weight: float = 0.0
    tvd_plus_set: AveragingSet = "draft"
    vocabulary: int = 8192
    prompt_loss: bool = False
    noise: float = 0.2
    batch_tokens: int = 4096
    optimiser: str = "muon"
    lr: float = 1e-3
    muon_lr: float = 0.02
    later_lr: float = 0.3
    warmup: int = 20
    decay: float = 0.6
    clip: float = 1.0
    clip_value: float = 0.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    validate_every: int = 100
    validate_documents: int = 64
    save_every: int = 50

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(steps for _, steps in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """(stage, first step of that stage) that optimiser step `step` (from 0) belongs to."""
        first = 0
        for number, (_, steps) in enumerate(self.stages):
            if step < first + steps:
                return number, first
            first += steps
        raise IndexError(f"step {step} is past the last of {self.total_steps}")

    def objective(self, passes: int) -> Objective:
        """What the head's losses are made of in a stage of so many passes."""
        return Objective(
            token=self.token_weight,
            top=self.top_weight if passes > 1 else 0.0,
            tvd=self.tvd_weight,
            tvd_plus=self.tvd_plus_weight,
            tvd_plus_set=self.tvd_plus_set,
        )

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Names of the settings that decide the result and are not those of `other` (as JSON has them)."""
        free = {"validate_every", "validate_documents", "save_every", "stages"}
        return [
            f.name
            for f in fields(self)
            if f.name not in free and getattr(self, f.name) != other.get(f.name)
        ]


# `passes` is the number of passes of the last stage.
PRESETS: dict[str, dict[str, Any]] = {
    "griffin": {"passes": 3},
    # arXiv 2502.11018's code, commit b27cfb9: train/main_griffin_1.py and main_griffin_2.py. Its warm-up and
    # schedule are meant for 800,000 steps of four conversations.
    "griffin-published": {
        "passes": 3,
        "mask": "published",
        "attention": "published",
        "optimiser": "adamw",
        "lr": 5e-5,
        "later_lr": 0.6,
        "warmup": 2000,
        "decay": 1.0,
        "clip": 0.0,
        "clip_value": 0.5,
        "vocabulary": 0,
    },
    "hass": {"passes": 3, "fusion": False, "two_heads": False, "align_top_k": 0},
    "eagle2": {"passes": 1, "fusion": False, "two_heads": False, "align_top_k": 0},
}


def staged(passes: int, steps: int) -> list[tuple[int, int]]:
    """Stages of 1, 2, ... `passes` passes: the first has six tenths of `steps`, the others share the rest.

    Raises:
        ValueError: Fewer steps than passes.
    """
    if steps < passes:
        raise ValueError(f"{steps} steps are too few for {passes} stages: raise --steps")
    if passes == 1:
        return [(1, steps)]
    first = max(1, steps * 6 // 10)
    cuts = [first + (steps - first) * i // (passes - 1) for i in range(passes)]
    return [(1, first), *((i + 1, cuts[i] - cuts[i - 1]) for i in range(1, passes))]
