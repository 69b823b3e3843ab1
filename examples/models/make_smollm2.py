"""Prompts for SmolLM2's draft that no data set has: functions of installed Python code to be completed.

    python examples/models/make_smollm2.py --output prompts.jsonl
    python examples/models/make_smollm2.py --package sympy --package numpy --with-examples --output more.jsonl
    vllm-griffin data --target T --input prompts.jsonl --generate ...    # the rest: smollm2-griffin/README.md

The target answers them, so that the draft learns what it writes when it goes on with code: mostly the code
that it was given, and some of its own.
"""

import ast
import importlib.util
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


def package_files(name: str) -> list[Path]:
    """An installed package's source files, without its tests."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise click.BadParameter(f"{name} is not an installed package", param_hint="--package")
    root = Path(spec.submodule_search_locations[0])
    return [p for p in sorted(root.rglob("*.py")) if "tests" not in p.relative_to(root).parts]


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
@click.option(
    "--package",
    "packages",
    multiple=True,
    help="Installed package to use in place of the standard library.",
)
@click.option(
    "--with-examples",
    is_flag=True,
    help="Only those whose docstring has examples and whose first line no `self`.",
)
@click.option("--seed", default=0, show_default=True)
def main(
    output: Path, number: int, packages: tuple[str, ...], with_examples: bool, seed: int
) -> None:
    """Write prompts that ask for functions to be completed."""
    files = (
        [path for name in packages for path in package_files(name)]
        if packages
        else stdlib_files()[0]
    )
    found = {header for path in files for header in headers(read(path))}
    fitting = sorted(header for header in found if LENGTH[0] <= len(header) <= LENGTH[1])
    if with_examples:
        fitting = [
            header
            for header in fitting
            if ">>>" in header and "(self" not in header.splitlines()[0]
        ]
    chosen = random.Random(seed)
    functions = chosen.sample(fitting, min(number, len(fitting)))
    rows = [
        {
            "id": i,
            "source": ",".join(packages) or "stdlib",
            "turns": [f"{chosen.choice(REQUESTS)}\n\n{function}\n"],
        }
        for i, function in enumerate(functions)
    ]
    write_lines(output, rows)
    click.echo(f"{len(rows)} of {len(fitting)} functions")


if __name__ == "__main__":
    main()
