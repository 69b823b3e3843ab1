"""``vllm-griffin eval``: acceptance of drafts, in this plugin's vLLM engine or by replay."""

import importlib.util
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import click

from vllm_griffin.commands.options import config_option, reason
from vllm_griffin.compat import INSTALL_TRAIN

if TYPE_CHECKING:
    from vllm_griffin.tree_shape import TreeShape

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("eval")
@config_option
@click.option("--target", required=True, help="Target model: folder or hub name.")
@click.option(
    "--chat-template", type=FILE, help="Jinja chat template, in place of the target's own."
)
@click.option(
    "--draft", "drafts", multiple=True, required=True, help="Draft: folder or hub name; repeatable."
)
@click.option(
    "--prompts",
    multiple=True,
    required=True,
    type=FILE,
    help='JSONL with "turns" or "prompt"; the first turn is asked. Repeatable: each file is a set.',
)
@click.option(
    "--temperature",
    "temperatures",
    multiple=True,
    type=click.FloatRange(0),
    default=(0.0, 1.0),
    show_default=True,
    help="Repeatable. Sampling is seeded by the question's number.",
)
@click.option(
    "--tree",
    "trees",
    multiple=True,
    default=("59,6,10", "chain:6"),
    show_default=True,
    help="nodes,depth,top_k or chain:length; repeatable.",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first prompts of each set.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Tokens of an answer, at most.",
)
@click.option(
    "--replay",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Replay the target's outputs stored in this JSONL file; what is missing is made first.",
)
@click.option(
    "--check-engine",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="With --replay: run so many prompts of each set in the engine too, and compare.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for evaluation.json and evaluation.png; an evaluation that was stopped goes on there.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    default="float32",
    show_default=True,
    help="Of the engine.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=8, show_default=True, help="Requests at a time."
)
@click.option(
    "--draft-vocab-size",
    type=click.IntRange(1),
    help="Draft from the most frequent tokens only; default: what each draft's config says.",
)
@click.option("--write-card", is_flag=True, help="Put the result into the drafts' model cards.")
@click.option(
    "--write-trees",
    is_flag=True,
    help="Keep the trees' acceptance lengths in the drafts' config.json: an engine then chooses the tree "
    "that pays on its machine.",
)
def command(
    target: str,
    drafts: tuple[str, ...],
    prompts: tuple[Path, ...],
    temperatures: tuple[float, ...],
    trees: tuple[str, ...],
    limit: int | None,
    max_tokens: int,
    replay: Path | None,
    check_engine: int,
    output: Path | None,
    dtype: str,
    batch: int,
    draft_vocab_size: int | None,
    chat_template: Path | None,
    write_card: bool,
    write_trees: bool,
) -> None:
    """Measure drafts: acceptance length, acceptance per depth, misaligned tokens.

    \b
    vllm-griffin eval --target T --draft D --prompts P.jsonl --output DIR
    vllm-griffin eval ... --draft D2 --replay outputs.jsonl    (compare drafts without an engine)

    Acceptance length is 1 + accepted / verify steps, pooled over a prompt set; intervals are a bootstrap
    over its prompts.
    """
    _check_options(drafts, replay, check_engine, output, dtype, write_card, write_trees)
    if output is not None:
        _try_folder(output)
    import torch

    from vllm_griffin import provenance
    from vllm_griffin.evaluate import metrics
    from vllm_griffin.evaluate.engine import EngineError, prepare_process
    from vllm_griffin.tree_shape import TreeShape

    made = provenance.describe(metrics.SEED)
    kept = output / "steps.jsonl" if output and not replay else None
    try:
        prepare_process()
        from vllm_griffin.evaluate.run import Evaluation, Request

        request = Request(
            target=target,
            drafts=tuple(dict.fromkeys(drafts)),
            prompts=prompts,
            temperatures=tuple(dict.fromkeys(temperatures)),
            trees=tuple(dict.fromkeys(TreeShape.parse(tree) for tree in trees)),
            limit=limit,
            max_tokens=max_tokens,
            dtype=dtype,
            batch=batch,
            draft_vocab_size=draft_vocab_size,
            chat_template=chat_template,
        )
        if write_trees:
            _check_sizes(request.trees)
        evaluation = Evaluation(request)
        rows, checks = (
            evaluation.by_replay(replay, check_engine)
            if replay
            else (evaluation.in_engine(kept, made), [])
        )
    except torch.OutOfMemoryError as error:
        raise click.ClickException(
            "the GPU's memory is full: lower --batch, or give --dtype bfloat16 (without --replay)"
        ) from error
    except (ValueError, OSError, KeyError, ImportError, EngineError) as error:
        raise click.ClickException(reason(error)) from error
    _show(rows, checks)
    if output is not None:
        file = _write(evaluation, made, replay, rows, checks, output)
    if write_trees:
        from vllm_griffin.evaluate.trees import pooled_lengths
        from vllm_griffin.evaluate.trees import write_trees as write_lengths

        for draft in request.drafts:
            try:
                write_lengths(Path(draft), pooled_lengths(draft, rows))
            except (ValueError, OSError) as error:
                raise click.ClickException(
                    f"{draft}: the trees are not written: {error}"
                ) from error
    if write_card:
        from vllm_griffin.card import write_card as write

        try:
            for draft in request.drafts:
                write(Path(draft), file)
        except (ValueError, OSError) as error:
            raise click.ClickException(f"the result is kept, the card is not: {error}") from error
    if kept:
        # Asked again, an engine measures again.
        kept.unlink(missing_ok=True)


def _check_options(
    drafts: tuple[str, ...],
    replay: Path | None,
    check_engine: int,
    output: Path | None,
    dtype: str,
    write_card: bool,
    write_trees: bool,
) -> None:
    if check_engine and replay is None:
        raise click.UsageError("--check-engine compares a replay with the engine: give --replay")
    if replay is not None and dtype != "float32":
        raise click.UsageError("a replay computes in float32: leave --dtype out")
    if output is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError(f"--output draws a picture: {INSTALL_TRAIN}")
    if write_card and (replay is not None or output is None):
        raise click.UsageError("--write-card needs a result of the engine and --output")
    for flag, wanted in (("--write-card", write_card), ("--write-trees", write_trees)):
        if wanted and not all(Path(draft).is_dir() for draft in drafts):
            raise click.UsageError(f"{flag} needs drafts in local folders")


def _try_folder(output: Path) -> None:
    """Hours of evaluation end there, so what refuses a file is said before them."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise click.ClickException(
            f"--output {output} takes no files ({error}): give another folder"
        ) from error


def _check_sizes(trees: Iterable["TreeShape"]) -> None:
    """An engine that chooses among a draft's trees knows them by their nodes."""
    for nodes, count in Counter(tree.nodes for tree in trees).items():
        if count > 1:
            raise click.UsageError(
                f"--write-trees keeps one tree of a size: {count} have {nodes} nodes"
            )


def _show(rows: list[dict[str, Any]], checks: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from vllm_griffin.evaluate.report import print_checks, print_table

    # Redirected output has no width of its own.
    console = Console() if Console().is_terminal else Console(width=160)
    print_table(rows, console)
    print_checks(checks, console)


def _write(
    evaluation: Any,
    made: dict[str, Any],
    replay: Path | None,
    rows: list[dict[str, Any]],
    checks: list[dict[str, Any]],
    output: Path,
) -> Path:
    """Write JSON and picture; returns the JSON file. What the disk does not take is printed."""
    from vllm_griffin.evaluate import plot
    from vllm_griffin.whole_file import write_json

    request = evaluation.request
    record = {
        "provenance": made,
        "mode": "replay" if replay else "engine",
        "draft_vocab_sizes": [
            None if tokens is None else len(tokens) for tokens in evaluation.vocabularies.values()
        ],
        "target": request.target,
        "drafts": list(request.drafts),
        "prompts": [str(path) for path in request.prompts],
        "chat_template": None if request.chat_template is None else str(request.chat_template),
        "outputs": str(replay) if replay else None,
        "limit": request.limit,
        "max_tokens": request.max_tokens,
        "dtype": request.dtype,
        "batch": request.batch,
        "rows": rows,
        "engine_check": checks,
    }
    file = output / "evaluation.json"
    try:
        write_json(file, record)
    except OSError as error:
        click.echo(json.dumps(record))
        raise click.ClickException(
            f"{file} is not written ({error}): the result, as JSON, is above"
        ) from error
    try:
        plot.draw(rows, output / "evaluation.png")
    except OSError as error:
        raise click.ClickException(f"{file} is written, its picture is not: {error}") from error
    click.echo(f"{file} and {output / 'evaluation.png'} are written")
    return file
