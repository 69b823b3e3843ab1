"""``vllm-griffin report``: the curves of training runs."""

from pathlib import Path

import click

from vllm_griffin.commands.options import config_option


@click.command()
@config_option
@click.argument(
    "folders",
    metavar="DIR...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for report.md and its pictures.  [default: DIR/report; several DIR need it]",
)
def command(folders: tuple[Path, ...], output: Path | None) -> None:
    """Draw the curves of the training runs in DIR...: losses, agreement, mask rate, acceptance.

    Several runs stand side by side, on one scale.
    """
    from vllm_griffin.report import ReportError, write_report

    if output is None and len(folders) > 1:
        raise click.UsageError("several runs need --output")
    try:
        page = write_report(folders, output or folders[0] / "report")
    except (ReportError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(page)
