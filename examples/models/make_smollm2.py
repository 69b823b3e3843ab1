"""Prompts for SmolLM2's draft that no data set has: functions of the Python standard library to be completed.

    python examples/models/make_smollm2.py --output prompts.jsonl
    vllm-griffin data --target T --input prompts.jsonl --generate ...    # the rest: smollm2-griffin/README.md

The target answers them, so that the draft learns what it writes when it goes on with code: mostly the code
that it was given, and some of its own.
"""

import ast
import random
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
from make_tiny import read, stdlib_files, write_lines

REQUESTS = (
    "Complete this function.",
    "Finish the code below.",
    "Write the body of this Python function:",
    "Implement the following function in Python.",
    "Here is the beginning of a function. Write the rest of it.",
)
LENGTH = (100, 900)  # characters


def headers(source: str) -> Iterator[str]:
    """Functions of a source file that have a docstring, up to its end."""
    lines = source.splitlines()
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            end = node.body[0].end_lineno
            yield textwrap.dedent("\n".join(lines[node.lineno - 1 : end]))


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSONL file.")
@click.option("--number", default=1500, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True)
def main(output: Path, number: int, seed: int) -> None:
    """Write prompts that ask for functions to be completed."""
    training, _ = stdlib_files()
    found = {header for path in training for header in headers(read(path))}
    fitting = sorted(header for header in found if LENGTH[0] <= len(header) <= LENGTH[1])
    chosen = random.Random(seed)
    functions = chosen.sample(fitting, min(number, len(fitting)))
    rows = [
        {"id": i, "source": "stdlib", "turns": [f"{chosen.choice(REQUESTS)}\n\n{function}\n"]}
        for i, function in enumerate(functions)
    ]
    write_lines(output, rows)
    click.echo(f"{len(rows)} of {len(fitting)} functions")


if __name__ == "__main__":
    main()
