"""``vllm-griffin convert``: drafts from one layout on disk to another."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vllm_griffin.commands.options import config_option

if TYPE_CHECKING:
    from vllm_griffin.convert import Form
    from vllm_griffin.tree_shape import TreeShape


def _tree(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> "TreeShape | None":
    if text is None:
        return None
    from vllm_griffin.tree_shape import TreeShape

    try:
        return TreeShape.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@config_option
@click.argument("source")
@click.option("--target", required=True, help="The model it drafts for: folder or hub name.")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="A new or empty folder."
)
@click.option(
    "--to",
    type=click.Choice(["griffin", "published", "speculators"]),
    default="griffin",
    show_default=True,
    help="The layout to write.",
)
@click.option(
    "--tree",
    callback=_tree,
    help="nodes,depth,top_k or chain:length that the draft is served with by default.  "
    "[default: the source's, else 59,6,10]",
)
@click.option(
    "--verifier",
    help="With --to speculators: the target's name there, if not --target's.",
)
@click.option("--revision", help="Branch, tag or commit of a SOURCE on the hub.")
def command(
    source: str,
    target: str,
    output: Path,
    to: "Form",
    tree: "TreeShape | None",
    verifier: str | None,
    revision: str | None,
) -> None:
    """Convert the draft SOURCE (a folder or hub name) to another layout, weights bit for bit.

    \b
    griffin       this project's: safetensors, no copy of the target's embedding, tree defaults
    published     what the published GRIFFIN and EAGLE code loads
    speculators   names the target, so that `vllm serve DRAFT` serves both without a flag

    Reads all three, EAGLE drafts included. Runs no code of a checkpoint.
    """
    from vllm_griffin.convert import convert
    from vllm_griffin.model.checkpoint import CheckpointError

    if to == "published" and tree:
        raise click.UsageError("--tree has no place in the published layout")
    if to != "speculators" and verifier:
        raise click.UsageError("--verifier is for --to speculators")
    try:
        made = convert(source, target, output, to, tree=tree, verifier=verifier, revision=revision)
    except CheckpointError as error:
        raise click.ClickException(str(error)) from error
    shape = made.tree or "not stored in this layout"
    click.echo(
        f"{made.folder}: {made.network} in the {to} layout; embedding {made.embedding}; tree {shape}"
    )
