"""``vllm-griffin train``: train a draft on training data."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from vllm_griffin.commands.options import F, config_option, given, reason
from vllm_griffin.compat import INSTALL_TRAIN
from vllm_griffin.train.settings import PRESETS, Settings, staged


def _setting(*names: str, help: str, **arguments: Any) -> Callable[[F], F]:
    """An option for a field of `Settings`: None if it is not given, so that the preset decides.

    The help tells the default, that of the preset "griffin" where presets differ.
    """
    flag = names[0]
    field = next((name for name in names if not name.startswith("-")), flag.split("/")[0])
    field = field.lstrip("-").replace("-", "_")
    plain = getattr(Settings(), field)
    values = [changes.get(field, plain) for changes in PRESETS.values()]
    text = flag.split("/")[not values[0]] if isinstance(plain, bool) else str(values[0])
    if len(set(values)) > 1:
        text += " with griffin"
    return click.option(*names, default=None, help=f"{help}  [default: {text}]", **arguments)


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
    type=click.Choice(list(PRESETS)),
    default="griffin",
    show_default=True,
    help="Defaults of the options below; each can still be given.",
)
@click.option("--init-from", help="Go on from the weights of this draft: folder or hub name.")
@click.option("--steps", default=1000, show_default=True, help="Optimiser steps of all stages.")
@click.option(
    "--passes", type=click.IntRange(1), help="Passes of the last stage.  [default: by preset]"
)
@click.option(
    "--stages", callback=_stages, help="passes:steps, joined by commas; in place of the two above."
)
@_setting("--fusion/--no-tgf", help="Token-guided fusion.")
@_setting("--two-heads/--no-teh", help="Token-enhanced head.")
@_setting("--align-top-k", type=click.IntRange(0), help="k of the alignment mask; 0: no mask.")
@_setting("--mask", type=click.Choice(["paper", "published"]), help="Form of that mask.")
@_setting(
    "--attention-mask",
    "attention",
    type=click.Choice(["proper", "published"]),
    help="Its softmax: as in decoding, or as published.",
)
@_setting("--feature-weight", type=float, help="Smooth L1 on features.")
@_setting("--token-weight", type=float, help="Soft cross-entropy.")
@_setting("--top-weight", type=float, help="Top-10 term, stages of several passes only.")
@_setting("--tvd-weight", type=float, help="Total variation distance.")
@_setting("--tvd-plus-weight", type=float, help="TVD++.")
@_setting(
    "--tvd-plus-set",
    type=click.Choice(["draft", "vocabulary"]),
    help="Over what TVD++ takes mean and deviation.",
)
@_setting(
    "--vocabulary", type=click.IntRange(0), help="Losses over the most frequent tokens; 0: all."
)
@_setting("--prompt-loss/--no-prompt-loss", help="Train on prompts too.")
@_setting("--noise", type=click.FloatRange(0), help="Uniform noise on input features.")
@_setting("--batch-tokens", type=click.IntRange(1), help="Slots of a step.")
@_setting(
    "--optimiser",
    type=click.Choice(["muon", "adamw"]),
    help="muon: for matrices, AdamW for the rest.",
)
@_setting("--lr", type=float, help="AdamW.")
@_setting("--muon-lr", type=float, help="Muon, for matrices.")
@_setting("--later-lr", type=float, help="Factor on both after the first stage.")
@_setting("--warmup", type=click.IntRange(0), help="Steps, in each stage.")
@_setting("--decay", type=click.FloatRange(0, 1), help="Last part of a stage, linear to 0.")
@_setting("--clip", type=click.FloatRange(0), help="Bound on the gradient's norm; 0: none.")
@_setting("--clip-value", type=click.FloatRange(0), help="Bound on its elements; 0: none.")
@_setting("--bf16/--no-bf16", help="Autocast; slow where the CPU has no bf16.")
@_setting("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, more time.")
@_setting("--seed", type=int, help="Of weights, order of documents and noise.")
@_setting("--validate-every", type=click.IntRange(1), help="Steps between validations.")
@_setting("--validate-documents", type=click.IntRange(1), help="Held-out documents to look at.")
@_setting("--save-every", type=click.IntRange(1), help="Steps between checkpoints.")
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
    ignored = given("steps", "passes", beside="stages")
    if ignored:
        raise click.UsageError(
            f"{ignored} would be ignored beside --stages: leave one or the other out"
        )
    import torch

    from vllm_griffin.card import write_card

    try:
        from vllm_griffin.train.loop import Trainer, TrainingError
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}: {INSTALL_TRAIN}") from error
    _check_tracker(report_to)

    if threads:
        torch.set_num_threads(threads)
    try:
        changes = dict(PRESETS[preset])
        last = passes or changes.pop("passes")
        changes.pop("passes", None)
        chosen = {name: value for name, value in options.items() if value is not None}
        settings = Settings(**(changes | chosen | {"stages": stages or staged(last, steps)}))
        shortest = min(n for _, n in settings.stages)
        if settings.warmup >= shortest:
            click.echo(
                f"note: a stage of {shortest} steps ends before the warm-up of {settings.warmup} does, so "
                "that its learning rate stays low: give --warmup, or more steps",
                err=True,
            )
        data = _data_record(data_folder)
        draft, parts, states = _load(target, data, init_from, shards, settings)
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
    except torch.OutOfMemoryError as error:
        raise click.ClickException(
            "the GPU's memory is full: lower --batch-tokens, or give --gradient-checkpointing"
        ) from error
    except (TrainingError, ValueError, KeyError, OSError, ImportError) as error:
        raise click.ClickException(reason(error)) from error
    if not trainer.accelerator.is_main_process:
        return
    try:
        write_card(output)
    except (ValueError, OSError) as error:
        raise click.ClickException(
            f"the draft is ready, its card is not written: {error}"
        ) from error
    click.echo(
        f"{output} is ready: vllm-griffin eval --target {target} --draft {output} --prompts P"
    )


def _check_tracker(name: str | None) -> None:
    """Refuse a tracker whose package is missing, which accelerate leaves out without a word."""
    from accelerate.tracking import get_available_trackers

    here = [str(tracker) for tracker in get_available_trackers()]
    if name not in (None, "all", *here):
        raise click.ClickException(
            f"--report-to {name}: no such tracker is installed (found: {', '.join(here) or 'none'}): install "
            "its package, or leave the option out"
        )


def _load(
    target: str,
    data: dict[str, Any],
    init_from: str | None,
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
    _note_other_target(data, target)
    folder = Path(data["folder"])
    if init_from:
        draft = load_draft(init_from, parts.embeddings)
    else:
        draft = new_draft(parts, fusion=settings.fusion, two_heads=settings.two_heads)
    states: States
    if data["settings"].get("hidden_states") == "online":
        if shards:
            raise click.UsageError("--shards: the data's hidden states are not stored")
        states = OnlineStates(read_documents(folder), load_target(target))
    else:
        states = StoredStates(folder, shards)
    _check_fit(folder, states, parts)
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


def _data_record(folder: Path) -> dict[str, Any]:
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
    return record | {"folder": str(folder)}


def _note_other_target(data: dict[str, Any], target: str) -> None:
    """Say if the data were made for a target of another name or, where they know them, of other weights."""
    from vllm_griffin.model.checkpoint import find_folder
    from vllm_griffin.model.files import fingerprint

    made_for, weights = data["settings"].get("target"), data.get("target_weights")
    if weights is None:
        same = made_for is not None and Path(made_for) == Path(target)
    else:
        same = weights == fingerprint(find_folder(target))
    if not same:
        known = "" if weights is None else ", whose config or weights were others"
        click.echo(
            f"note: {data['folder']} was made for the target {made_for}{known}, not {target}",
            err=True,
        )
