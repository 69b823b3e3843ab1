"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _load(context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise click.BadParameter(f"{path} is not a list of `option: value` lines")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    names = {option: p.name for p in context.command.params for option in _spellings(p)}
    unknown = sorted(values.keys() - names.keys())
    if unknown:
        raise click.BadParameter(
            f"{path}: unknown option {', '.join(unknown)}; see {context.command_path} --help"
        )
    named = {names[key]: value for key, value in values.items()}
    for parameter in context.command.params:
        given = named.get(parameter.name or "")
        if getattr(parameter, "multiple", False) and isinstance(given, str | int | float):
            named[parameter.name] = [given]
    context.default_map = {**named, **(context.default_map or {})}
    return path


def _spellings(parameter: click.Parameter) -> set[str]:
    """The names under which a file may give a parameter: those of its flags, and its own."""
    flags = [option.lstrip("-").replace("-", "_") for option in parameter.opts]
    return {*flags, parameter.name or ""} - {"", "config", "help"}


def reason(error: Exception) -> str:
    """What an error says; of a KeyError, without the quotes around it."""
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def config_option(command: F) -> F:
    """Add ``--config FILE.yaml``: defaults of this command's options by name; flags win."""
    return click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_load,
        help="YAML file of option: value lines; flags on the command line win.",
    )(command)
