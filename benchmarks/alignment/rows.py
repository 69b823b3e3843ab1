"""The rows of the study: what is trained, and how often."""

from dataclasses import dataclass

MAIN = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """One draft of the table, trained once per seed.

    Attributes:
        name: As in the table.
        trunk: Whose one-pass trunk it goes on from, see `TRUNKS`.
        flags: Of `vllm-griffin train`.
        passes: Passes of the second stage.
        seeds: One run each.
        step_factor: Steps of the second stage, relative to the others'.
    """

    name: str
    trunk: str
    flags: tuple[str, ...]
    passes: int
    seeds: tuple[int, ...] = (0,)
    step_factor: float = 1.0


# One-pass trunks: one per architecture and seed, shared by the rows with that architecture.
TRUNKS: dict[str, tuple[str, ...]] = {
    "eagle": ("--preset", "eagle2"),
    "griffin": ("--preset", "griffin"),
    "no-tgf": ("--preset", "griffin", "--no-tgf"),
    "no-teh": ("--preset", "griffin", "--no-teh"),
}

GRIFFIN = ("--preset", "griffin")
# Seconds of a GRIFFIN step of three passes over those of one: docs/results/training.md
THREE_PASSES = 2.46


def real_rows(cost: float) -> list[Row]:
    """The real study's rows, the main ones first.

    Args:
        cost: Seconds of a GRIFFIN step of three passes over those of an EAGLE step of one; EAGLE-2 gets that
            many more steps in the row of equal time. 15.2 s and 5.1 s in the rows of seed 0, one core.
    """
    return [
        Row("EAGLE-2", "eagle", ("--preset", "eagle2"), 1, MAIN),
        Row("HASS", "eagle", ("--preset", "hass"), 3, MAIN),
        Row("GRIFFIN", "griffin", GRIFFIN, 3, MAIN),
        Row("GRIFFIN, one pass", "griffin", GRIFFIN, 1),
        Row("GRIFFIN, no mask", "griffin", (*GRIFFIN, "--align-top-k", "0"), 3),
        Row("GRIFFIN, no TGF", "no-tgf", (*GRIFFIN, "--no-tgf"), 3),
        Row("GRIFFIN, no TEH", "no-teh", (*GRIFFIN, "--no-teh"), 3),
        Row("GRIFFIN + TVD++", "griffin", (*GRIFFIN, "--tvd-plus-weight", "0.1"), 3, (2,)),
        Row("EAGLE-2, GRIFFIN's time", "eagle", ("--preset", "eagle2"), 1, (2,), step_factor=cost),
        # Past the paper: what the rows above and held-out prompts favour, put together
        Row(
            "GRIFFIN, no mask, feature weight 3",
            "griffin",
            (*GRIFFIN, "--align-top-k", "0", "--feature-weight", "3"),
            3,
            (2,),
        ),
        Row(
            "GRIFFIN, one pass, feature weight 3, GRIFFIN's time",
            "griffin",
            (*GRIFFIN, "--feature-weight", "3"),
            1,
            (2,),
            step_factor=THREE_PASSES,
        ),
    ]


def tiny_rows() -> list[Row]:
    """One factor at a time around the default, three passes and the top-3 mask in the paper's forms."""
    flags: dict[str, tuple[tuple[str, ...], int]] = {
        "default": ((), 3),
        **{f"k = {k}": (("--align-top-k", str(k)), 3) for k in (1, 5, 10)},
        "no mask": (("--align-top-k", "0"), 3),
        **{f"{n} passes" if n > 1 else "1 pass": ((), n) for n in (1, 2, 4)},
        "published mask": (("--mask", "published"), 3),
        "published softmax": (("--attention-mask", "published"), 3),
        "published mask and softmax": (("--mask", "published", "--attention-mask", "published"), 3),
    }
    return [
        Row(name, "griffin", (*GRIFFIN, *extra), passes, MAIN)
        for name, (extra, passes) in flags.items()
    ]
