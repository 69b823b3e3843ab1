"""Options that several commands share."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import click
from click.core import ParameterSource

F = TypeVar("F", bound=Callable[..., Any])


def _load(context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    if path is None:
        return None
    values = {str(key).replace("-", "_"): value for key, value in _read_yaml(path).items()}
    for parameter in context.command.params:
        for option in _plain(parameter.secondary_opts) & values.keys():
            off = click.BOOL.convert(str(values.pop(option)), parameter, context)
            values[parameter.name or ""] = not off
    names = {option: p.name for p in context.command.params for option in _spellings(p)}
    unknown = sorted(values.keys() - names.keys())
    if unknown:
        raise click.BadParameter(
            f"{path}: unknown option {', '.join(unknown)}; see {context.command_path} --help"
        )
    named = {names[key]: value for key, value in values.items()}
    for parameter in context.command.params:
        value = named.get(parameter.name or "")
        if getattr(parameter, "multiple", False) and isinstance(value, str):
            named[parameter.name] = [value]
    context.default_map = {**named, **(context.default_map or {})}
    return path


def _read_yaml(path: Path) -> dict[Any, Any]:
    """A YAML file of option: value lines.

    Numbers are left as text, as the command line has them: YAML 1.1 would read `1:50` as 110.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar = {
            first: [found for found in resolvers if not found[0].endswith((":int", ":float"))]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    except (OSError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise click.BadParameter(f"{path} is not a list of `option: value` lines")
    return values


def _spellings(parameter: click.Parameter) -> set[str]:
    """The names under which a file may give a parameter: those of its flags, and its own."""
    return (_plain(parameter.opts) | {parameter.name or ""}) - {"", "config", "help"}


def _plain(flags: Iterable[str]) -> set[str]:
    return {flag.lstrip("-").replace("-", "_") for flag in flags}


def given(*names: str, beside: str | None = None) -> str:
    """Those of the command's parameters that the command line or the YAML file gives, as flags.

    Args:
        beside: A parameter without which none counts; where the command line gives it, it wins over what
            the file gives, and that does not count.
    """
    context = click.get_current_context()
    ignored = {ParameterSource.DEFAULT}
    if beside is not None:
        source = context.get_parameter_source(beside)
        if source is ParameterSource.DEFAULT:
            return ""
        if source is ParameterSource.COMMANDLINE:
            ignored.add(ParameterSource.DEFAULT_MAP)
    found = [n for n in names if context.get_parameter_source(n) not in ignored]
    return ", ".join("--" + name.replace("_", "-") for name in found)


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
