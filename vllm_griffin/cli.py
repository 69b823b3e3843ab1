"""``vllm-griffin``: the command line. Each command is a module of `vllm_griffin.commands`."""

import importlib

import click

COMMANDS = {
    "data": ("data", "Make training data: documents, and the target's hidden states."),
    "train": ("train", "Train a draft on it."),
    "eval": ("evaluate", "Measure a draft's acceptance length, in the engine or by replay."),
    "convert": ("convert", "Convert drafts between layouts."),
    "report": ("report", "Draw the curves of training runs."),
    "trace": ("trace", "Draw the draft trees that an engine verified."),
}


class _Commands(click.Group):
    """Imports a command when it is called, so that `--help` needs neither torch nor vLLM."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"vllm_griffin.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vllm-griffin")
def main() -> None:
    """GRIFFIN draft trees for vLLM: make training data, train a draft for your target, measure it.

    In order: data, train, eval. Every command takes --help, and its options from a YAML file (--config).
    """


if __name__ == "__main__":
    main()
