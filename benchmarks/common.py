"""What the benchmarks of speed share: vLLM's runners, options, and where a result comes from."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

CPU = "VLLM_GRIFFIN_CPU"
# The environment of a process with each of vLLM's runners; None takes a variable away. What the
# CPU's switch sets in this process must not reach one without it.
RUNNERS: dict[str, dict[str, str | None]] = {
    "V1": {CPU: None, "TRITON_INTERPRET": None, "VLLM_USE_V2_MODEL_RUNNER": "0"},
    "V2": {"VLLM_USE_V2_MODEL_RUNNER": "1"},
}


def numbers(_context: click.Context, _parameter: click.Parameter, text: str) -> list[int]:
    """Of an option like `1,2,4`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of integers") from None


def baseline_option(command: Any) -> Any:
    """`--baseline`, given to a command as `baselines`: on a CPU both runners, elsewhere the newer one."""
    return click.option(
        "--baseline",
        "baselines",
        multiple=True,
        type=click.Choice(list(RUNNERS)),
        default=tuple(RUNNERS) if CPU in os.environ else ("V2",),
        show_default=True,
        help="vLLM's runner without speculation; repeatable.",
    )(command)


def forced(acceptance: float) -> dict[str, Any]:
    """Of a speculative config: drafts are accepted by chance, so many tokens a step on average."""
    return {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": acceptance}


def write_table(
    output: Path,
    made: dict[str, Any],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    times: bool = True,
) -> None:
    """Print a table, and write it beside the JSON file `output` with notes, command, machine and versions.

    Args:
        times: Whether the table has times, which are those of this machine.
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    if times and made["hardware"]["gpu"] is None:
        notes = [*notes, "A CPU's times: they say nothing about a GPU."]
    lines += ["", *notes] if notes else []
    hardware = ", ".join(f"{k} {v}" for k, v in made["hardware"].items())
    versions = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
    origin = f"`{made['command']}`\n\n{hardware}; commit {made['commit']}; {versions}\n"
    output.with_suffix(".md").write_text("\n".join([*lines, "", origin]))
    click.echo("\n".join(lines))


def draw_engines(
    rows: Sequence[dict[str, Any]],
    x: tuple[str, str],
    y: tuple[str, str],
    picture: Path,
    level: float | None = None,
) -> None:
    """A line for each engine; x and y: field of a row, label of the axis; a grey line at `level`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == name]
        axes.plot([r[x[0]] for r in own], [r[y[0]] for r in own], marker="o", label=name)
    if level is not None:
        axes.axhline(level, color="grey", linewidth=0.8)
    axes.set_xlabel(x[1])
    axes.set_ylabel(y[1])
    axes.legend(fontsize=8)
    figure.savefig(picture, dpi=110)
