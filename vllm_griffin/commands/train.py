"""``vllm-griffin train``: train a draft on training data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from vllm_griffin.commands.options import config_option, reason

# Read off the module of the settings when the command runs; here so that --help imports no torch.
PRESETS = ("griffin", "griffin-published", "hass", "eagle2")


def _stages(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> list[tuple[int, int]] | None:
    if text is None:
        return None
    try:
        stages = [(int(p), int(n)) for p, n in (part.split(":") for part in text.split(","))]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not like 1:700,3:300 (passes:steps)") from error
    if any(p < 1 or n < 1 for p, n in stages):
        raise click.BadParameter(f"{text!r}: passes and steps are at least 1")
    return stages


@click.command()
@config_option
@click.option("--target", required=True, help="Target model: folder or hub name.")
@click.option(
    "--data",
    "data_folder",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that vllm-griffin data made.",
)
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder for the draft."
)
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    default="griffin",
    show_default=True,
    help="Defaults of the options below; each can still be given.",
)
@click.option("--init-from", type=click.Path(exists=True), help="Go on from this draft's weights.")
@click.option("--steps", default=1000, show_default=True, help="Optimiser steps of all stages.")
@click.option("--passes", type=click.IntRange(1), help="Passes of the last stage.")
@click.option(
    "--stages", callback=_stages, help="passes:steps, joined by commas; in place of the two above."
)
@click.option("--fusion/--no-tgf", default=None, help="Token-guided fusion.  [default: by preset]")
@click.option(
    "--two-heads/--no-teh", default=None, help="Token-enhanced head.  [default: by preset]"
)
@click.option("--align-top-k", type=click.IntRange(0), help="k of the alignment mask; 0: no mask.")
@click.option("--mask", type=click.Choice(["paper", "published"]), help="Form of that mask.")
@click.option("--attention-mask", "attention", type=click.Choice(["proper", "published"]))
@click.option("--feature-weight", type=float, help="Smooth L1 on features.")
@click.option("--token-weight", type=float, help="Soft cross-entropy.")
@click.option("--top-weight", type=float, help="Top-10 term, stages of several passes only.")
@click.option("--tvd-weight", type=float, help="Total variation distance.")
@click.option("--tvd-plus-weight", type=float, help="TVD++.")
@click.option(
    "--tvd-plus-set",
    type=click.Choice(["draft", "vocabulary"]),
    help="Over what TVD++ takes mean and deviation.",
)
@click.option(
    "--vocabulary", type=click.IntRange(0), help="Losses over the most frequent tokens; 0: all."
)
@click.option("--prompt-loss/--no-prompt-loss", default=None, help="Train on prompts too.")
@click.option("--noise", type=click.FloatRange(0), help="Uniform noise on input features.")
@click.option("--batch-tokens", type=click.IntRange(1), help="Slots of a step.")
@click.option("--optimiser", type=click.Choice(["muon", "adamw"]))
@click.option("--lr", type=float, help="AdamW.")
@click.option("--muon-lr", type=float, help="Muon, for matrices.")
@click.option("--later-lr", type=float, help="Factor on both after the first stage.")
@click.option("--warmup", type=click.IntRange(0), help="Steps, in each stage.")
@click.option("--decay", type=click.FloatRange(0, 1), help="Last part of a stage, linear to 0.")
@click.option("--clip", type=click.FloatRange(0), help="Bound on the gradient's norm; 0: none.")
@click.option("--clip-value", type=click.FloatRange(0), help="Bound on its elements; 0: none.")
@click.option("--bf16/--no-bf16", default=None, help="Autocast; slow where the CPU has no bf16.")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=None)
@click.option("--seed", type=int)
@click.option("--validate-every", type=click.IntRange(1), help="Steps.")
@click.option("--validate-documents", type=click.IntRange(1), help="Held-out documents to look at.")
@click.option("--save-every", type=click.IntRange(1), help="Steps.")
@click.option("--shards", type=click.IntRange(1), help="Use only the first shards of the data.")
@click.option("--report-to", help="A tracker that accelerate knows, such as tensorboard.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of the written draft.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: PyTorch's]")
@click.option("--dry-run", is_flag=True, help="Say rows, disk, memory and time, and stop.")
def command(
    target: str,
    data_folder: Path,
    output: Path,
    preset: str,
    init_from: str | None,
    steps: int,
    passes: int | None,
    stages: list[tuple[int, int]] | None,
    shards: int | None,
    report_to: str | None,
    dtype: str,
    threads: int | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train a draft for TARGET on DATA; OUTPUT is ready to serve, and continued if it was begun.

    \b
    vllm-griffin train --target T --data DATA --output DRAFT
    accelerate launch -m vllm_griffin.cli train ...      (several processes, a GPU each)
    """
    import torch

    from vllm_griffin.card import write_card

    try:
        from vllm_griffin.train.loop import Trainer, TrainingError
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}: pip install 'vllm-griffin[train]'") from error
    from vllm_griffin.train.settings import PRESETS as CHANGES
    from vllm_griffin.train.settings import Settings, staged

    if threads:
        torch.set_num_threads(threads)
    try:
        changes = dict(CHANGES[preset])
        last = passes or changes.pop("passes")
        changes.pop("passes", None)
        chosen = {name: value for name, value in options.items() if value is not None}
        settings = Settings(**(changes | chosen | {"stages": stages or staged(last, steps)}))
        data = _data_record(data_folder, target)
        online = data["settings"].get("hidden_states") == "online"
        if online and shards:
            raise click.UsageError("--shards: the data's hidden states are not stored")
        draft, parts, states = _load(target, data_folder, init_from, online, shards, settings)
        layout = {"fusion": draft.config.fusion, "two_heads": draft.config.two_heads}
        for name, flag in (("fusion", "--fusion/--no-tgf"), ("two_heads", "--two-heads/--no-teh")):
            if chosen.get(name, layout[name]) != layout[name]:
                raise click.UsageError(f"{flag}: --init-from has the layout of {init_from}")
        settings = replace(settings, **layout)
        record = {
            "target": target,
            "data": data,
            "preset": preset,
            "init_from": init_from,
        }
        if dry_run:
            from vllm_griffin.train.estimate import estimate

            for name, text in estimate(draft, states, parts, settings, fresh=not init_from).rows():
                click.echo(f"{name:>24}  {text}")
            return
        trainer = Trainer(
            draft,
            states,
            parts,
            settings,
            output,
            fresh=init_from is None,
            report_to=report_to,
            record=record,
        )
        trainer.run(getattr(torch, dtype))
    except (TrainingError, ValueError, KeyError, OSError, ImportError) as error:
        raise click.ClickException(reason(error)) from error
    if not trainer.accelerator.is_main_process:
        return
    write_card(output)
    click.echo(
        f"{output} is ready: vllm-griffin eval --target {target} --draft {output} --prompts P"
    )


def _load(
    target: str,
    data_folder: Path,
    init_from: str | None,
    online: bool,
    shards: int | None,
    settings: Any,
) -> tuple[Any, Any, Any]:
    """The network to train, what it takes from the target, and the documents with their states."""
    from vllm_griffin.data.documents import read_documents
    from vllm_griffin.data.hidden import load_target
    from vllm_griffin.data.shards import OnlineStates, States, StoredStates
    from vllm_griffin.train.checkpoint import load_draft
    from vllm_griffin.train.setup import load_target_parts, new_draft

    parts = load_target_parts(target)
    if init_from:
        draft = load_draft(init_from, parts.embeddings)
    else:
        draft = new_draft(parts, fusion=settings.fusion, two_heads=settings.two_heads)
    states: States
    if not online:
        states = StoredStates(data_folder, shards)
    else:
        states = OnlineStates(read_documents(data_folder), load_target(target))
    _check_fit(data_folder, states, parts)
    return draft, parts, states


def _check_fit(folder: Path, states: Any, parts: Any) -> None:
    """Refuse data of a target of another size.

    Raises:
        ValueError: Names the data and both sizes.
    """
    vocab, hidden = parts.head.shape
    largest = max(max(document.tokens) for document in states.documents)
    if largest >= vocab:
        raise ValueError(
            f"{folder} has the token {largest}, the target {vocab} tokens: it was made for another target"
        )
    width = states.features(0).shape[1]
    if width != hidden:
        raise ValueError(
            f"{folder} has hidden states of size {width}, the target of size {hidden}: it was made for "
            "another target"
        )


def _data_record(folder: Path, target: str) -> dict[str, Any]:
    """What `data.json` says of the training data, and where it is.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The data are not finished.
    """
    import json

    path = folder / "data.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no data.json: make it with vllm-griffin data")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not record.get("finished"):
        raise ValueError(f"{folder} is not finished: run its vllm-griffin data again, it goes on")
    made_for = record["settings"].get("target")
    if made_for != target:
        click.echo(f"note: {folder} was made for the target {made_for}, not {target}", err=True)
    return record | {"folder": str(folder)}
