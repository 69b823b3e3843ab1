"""``vllm-griffin data``: make a training set for a draft of a target."""

import math
from pathlib import Path
from typing import Any

import click

from vllm_griffin.commands.options import config_option, given, reason

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _temperatures(
    _context: click.Context, _parameter: click.Parameter, value: object
) -> tuple[float, ...]:
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    try:
        found = tuple(float(part) for part in parts)
    except ValueError as error:
        raise click.BadParameter("numbers with commas between, such as 0,0.7,1.0") from error
    if not found or not all(0 <= temperature < math.inf for temperature in found):
        raise click.BadParameter("temperatures are 0 or more")
    return found


@click.command()
@config_option
@click.option(
    "--target",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Target model: folder or hub name.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the training set. A second run with the same settings goes on.",
)
@click.option(
    "--input", multiple=True, type=_FILE, help="File to read; may be given several times."
)
@click.option(
    "--format",
    type=click.Choice(["prompts", "chat", "tokens", "text"]),
    help="What the lines are. Default: told line by line from their fields.",
)
@click.option(
    "--chat-template", type=_FILE, help="Jinja chat template, in place of the target's own."
)
@click.option(
    "--generate",
    is_flag=True,
    help="Let the target answer, through vLLM; of a chat, the first user turn only.",
)
@click.option(
    "--draw",
    type=click.IntRange(min=1),
    metavar="N",
    help="No inputs: the target makes N prompts from its chat template, and answers them.",
)
@click.option(
    "--temperatures",
    default="0,0.7,1.0",
    show_default=True,
    type=click.UNPROCESSED,
    metavar="T[,T...]",
    callback=_temperatures,
    help="Of the target's answers, in turn by prompt.",
)
@click.option(
    "--max-new-tokens",
    default=256,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens of an answer, or of a drawn prompt, at most.",
)
@click.option(
    "--prompt-tokens",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    help="With --generate, tokens of a piece of text that the target continues.",
)
@click.option(
    "--hidden-states",
    default="stored",
    show_default=True,
    type=click.Choice(["stored", "online", "vllm"]),
    help="Stored now; computed while training; or stored, from vLLM (targets that need several GPUs).",
)
@click.option("--length", type=click.IntRange(min=3), help="Tokens of a piece of text.")
@click.option(
    "--max-length",
    type=click.IntRange(min=3),
    help="Tokens of a document; longer ones are cut. Default: 2048, or the target's context if smaller.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Use the first prompts, chats or texts only."
)
@click.option(
    "--exclude", multiple=True, type=_FILE, help="File of evaluation prompts, to be left out."
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the answers drawn."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's.")
@click.option(
    "--tensor-parallel",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="GPUs that share the target in vLLM.",
)
@click.option(
    "--on-error",
    default="skip",
    show_default=True,
    type=click.Choice(["skip", "stop"]),
    help="What to do at a line that cannot be used.",
)
@click.option(
    "--dry-run", is_flag=True, help="Say how much data, disk, memory and time it would be."
)
def command(**options: Any) -> None:
    """Makes a training set: documents of tokens, and the target's hidden states at them.

    Inputs are JSONL files, a kind of line for each use: prompts (turns or prompt), which need --generate;
    chats (messages, or ShareGPT's conversations), whose assistant turns are learnt; token ids
    (prompt_token_ids and response_token_ids); text. Any other file is plain text, learnt as a whole. A
    chat's leading answers, which no user asked for, are left out.

    \b
    vllm-griffin data --target T --output DATA --input prompts.jsonl --generate
    vllm-griffin data --target T --output DATA --input sharegpt.json
    vllm-griffin data --target T --output DATA --draw 2000
    """
    if bool(options["input"]) == (options["draw"] is not None):
        raise click.UsageError("give either --input FILE or --draw N")
    _check_ignored(options["generate"], options["draw"])
    from vllm_griffin.data.make import make
    from vllm_griffin.data.settings import Settings

    try:
        make(Settings(**options))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        # What vLLM and transformers say of a target that they cannot run, and what the system says.
        raise click.ClickException(reason(error)) from error


def _check_ignored(generate: bool, draw: int | None) -> None:
    ignored = "" if generate or draw else given("temperatures", "max_new_tokens")
    if ignored:
        raise click.UsageError(f"{ignored}: give --generate or --draw, or leave it out")
    ignored = "" if generate else given("prompt_tokens")
    if ignored:
        raise click.UsageError(f"{ignored}: give --generate, or leave it out")
