"""``vllm-griffin trace``: draw the draft trees that an engine verified."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vllm_griffin.commands.options import config_option

if TYPE_CHECKING:
    from collections.abc import Callable


@click.command()
@config_option
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--tokenizer",
    metavar="TARGET",
    help="The target, folder or hub name; shows text in place of token ids.",
)
@click.option("--request", help="Only this request, by the id its client gave or got.")
@click.option("--step", type=click.IntRange(min=0), help="Only this verify step of each request.")
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Trees to draw at most; 0 draws none.",
)
def command(
    file: Path, tokenizer: str | None, request: str | None, step: int | None, limit: int
) -> None:
    """Draws the draft trees of a trace FILE, as VLLM_GRIFFIN_TRACE=FILE makes an engine write it.

    A star marks what the target accepted, a number a node's probability given its parent, an arrow
    the token that the target added.
    """
    from vllm_griffin.trace import draw_tree, read_trace, summarize

    try:
        records = read_trace(file)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    chosen = [
        record
        for record in records
        if request in (None, record.request_id) and step in (None, record.step)
    ]
    if not chosen:
        raise click.ClickException(f"{file} has no verify step that matches")
    decode = _decoder(tokenizer)
    for record in chosen[:limit]:
        click.echo(
            f"request {record.request_id}, step {record.step}, position {record.position}: "
            f"{record.num_drafted} drafted, {len(record.accepted) - 1} accepted"
        )
        click.echo(draw_tree(record, decode) + "\n")
    summary = summarize(chosen)
    click.echo(
        f"{summary.requests} requests, {summary.steps} verify steps, {summary.tokens} tokens, "
        f"{summary.drafted} nodes drafted: acceptance length {summary.acceptance_length:.2f}"
    )


def _decoder(target: str | None) -> "Callable[[int], str] | None":
    if target is None:
        return None
    from vllm_griffin.data.chat import load_tokenizer

    tokenizer = load_tokenizer(target)
    return lambda token: str(tokenizer.decode([token]))
