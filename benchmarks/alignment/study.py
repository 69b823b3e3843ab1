"""The alignment study: does GRIFFIN's training give longer acceptance than HASS's and EAGLE-2's?

    python benchmarks/alignment/study.py real --data DATA --work DIR
    python benchmarks/alignment/study.py tiny --data DATA --data-text TEXT --prompts P --work DIR
    python benchmarks/alignment/study.py table docs/results/alignment/real

DATA are training sets that `vllm-griffin data` made. Every row is trained and evaluated by the commands that
a user has, and its result is kept: a study that was stopped goes on with the next row, a row with the next
checkpoint. `benchmarks/alignment/README.md` says what is compared and how.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click
from rows import TRUNKS, Row, real_rows, tiny_rows
from summary import write_summary

from vllm_griffin.whole_file import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "alignment"
# Chosen on held-out prompts (docs/results/alignment/README.md): at the trunk's own rates a short second stage
# does not come back to where the trunk was.
LATER = ["--muon-lr", "0.006", "--lr", "0.0003", "--top-weight", "0"]


@dataclass
class Study:
    """Where a study's parts are, and how long its rows are trained.

    `steps` are optimiser steps of the trunk and of the second stage; `common` are flags of all training runs,
    `later` those of second stages, `evaluation` those of all evaluations.
    """

    target: Path
    work: Path
    results: Path
    steps: tuple[int, int]
    common: list[str]
    later: list[str]
    evaluation: list[str]

    def run(self, rows: Iterable[Row], data: dict[str, Path], seeds: set[int]) -> None:
        """Train and evaluate what is not there yet, seed by seed."""
        rows = list(rows)
        for seed in sorted(seeds):
            for row in rows:
                if seed in row.seeds:
                    for name, folder in data.items():
                        self._row(row, f"{row.name}{name}", folder, seed)
            write_summary(self.results)

    def _row(self, row: Row, name: str, data: Path, seed: int) -> None:
        result = self.results / f"{slug(name)}-{seed}.json"
        steps = round(self.steps[1] * row.step_factor)
        if result.exists():
            record = json.loads(result.read_text())
            found = [[1, record["trunk_steps"]], *record["training"]["settings"]["stages"]]
            _check_stages(result, found, [[1, self.steps[0]], [row.passes, steps]], "--results")
            return
        click.secho(f"{name}, seed {seed}", bold=True)
        draft = self.work / f"{slug(name)}-{seed}"
        trunk = self._trunk(row, data, seed)
        flags = (*row.flags, *self.later)
        self._train(draft, data, seed, [row.passes, steps], flags, trunk)
        scratch = self.work / "evaluation" / f"{slug(name)}-{seed}"
        vllm_griffin(
            "eval", "--target", self.target, "--draft", draft, "--output", scratch, *self.evaluation
        )
        evaluated = json.loads((scratch / "evaluation.json").read_text())
        trained = json.loads((draft / "run.json").read_text())
        log = [json.loads(x) for x in (draft / "log.jsonl").read_text().splitlines()]
        record = {
            "row": name,
            "seed": seed,
            "trunk": row.trunk,
            "trunk_steps": self.steps[0],
            "training": trained,
            "log": log,
            "evaluation": evaluated,
        }
        write_json(result, record)

    def _trunk(self, row: Row, data: Path, seed: int) -> Path:
        trunk = self.work / f"trunk-{row.trunk}-{slug(data.name)}-{seed}"
        flags = TRUNKS[row.trunk]
        self._train(trunk, data, seed, [1, self.steps[0]], flags, None)
        return trunk

    def _train(
        self,
        output: Path,
        data: Path,
        seed: int,
        stage: list[int],
        flags: Iterable[str],
        init: Path | None,
    ) -> None:
        done = output / "done"
        if done.exists():
            settings = json.loads((output / "run.json").read_text())["settings"]
            _check_stages(output, settings["stages"], [stage], "--work")
            return
        going_on = ["--init-from", init] if init else []
        vllm_griffin(
            "train", "--target", self.target, "--data", data, "--output", output, *flags,
            "--stages", ":".join(map(str, stage)), "--seed", seed, *going_on, *self.common,
        )  # fmt: skip
        done.touch()


def _check_stages(path: Path, found: list[list[int]], wanted: list[list[int]], option: str) -> None:
    """What is there and has other steps than asked for is neither taken for them nor written over.

    Args:
        found, wanted: Passes and steps of each stage.

    Raises:
        click.ClickException: names both, and the option that leads elsewhere.
    """
    if found != wanted:
        raise click.ClickException(
            f"{path} was made with the steps {found}, not {wanted}: give {option} another folder"
        )


def vllm_griffin(*arguments: object) -> None:
    """Run a command of the package as a user does."""
    command = [sys.executable, "-m", "vllm_griffin.cli", *map(str, arguments)]
    subprocess.run(command, check=True)


def slug(name: str) -> str:
    """A row's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _seeds(_context: click.Context, _parameter: click.Parameter, text: str) -> set[int]:
    return {int(part) for part in text.split(",")}


@click.group()
def main() -> None:
    """Train and evaluate the rows of the alignment study."""


@main.command()
@click.option("--target", type=click.Path(path_type=Path), help="Default: SmolLM2-135M-Instruct.")
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Scratch, kept.")
@click.option("--steps", default=(300, 60), show_default=True, type=(int, int))
@click.option("--cost", default=3.0, show_default=True, help="See rows.real_rows.")
@click.option("--seeds", default="0,1,2", callback=_seeds, show_default=True)
@click.option("--rows", "names", help="Only these, separated by semicolons.")
@click.option("--prompts-per-set", default=40, show_default=True)
@click.option("--threads", type=int)
@click.option("--results", default=RESULTS / "real", type=click.Path(path_type=Path))
def real(
    target: Path | None,
    data: Path,
    work: Path,
    steps: tuple[int, int],
    cost: float,
    seeds: set[int],
    names: str | None,
    prompts_per_set: int,
    threads: int | None,
    results: Path,
) -> None:
    """EAGLE-2, HASS and GRIFFIN for a real chat model, with GRIFFIN's parts taken away one by one."""
    if target is None:
        from vllm_griffin.pretrained import smollm2_instruct

        target = smollm2_instruct()
    sets = [
        ROOT / "examples" / "prompts" / f"{n}.jsonl" for n in ("mt_bench", "humaneval", "gsm8k")
    ]
    evaluation = [str(x) for s in sets for x in ("--prompts", s)]
    evaluation += ["--temperature", "0", "--temperature", "1", "--tree", "59,6,10"]
    evaluation += ["--tree", "chain:6", "--max-tokens", "128", "--limit", str(prompts_per_set)]
    evaluation += ["--replay", str(Path(__file__).parent / "outputs" / "smollm2.jsonl")]
    common = ["--dtype", "float32", *(["--threads", str(threads)] if threads else [])]
    study = Study(target, work, results, steps, common, LATER, evaluation)
    chosen = [r for r in real_rows(cost) if names is None or r.name in names.split(";")]
    study.run(chosen, {"": data}, seeds)


@main.command()
@click.option("--target", default=ROOT / "examples/models/target", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data-text", type=click.Path(exists=True, path_type=Path), help="Original text.")
@click.option("--prompts", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Scratch, kept.")
@click.option("--steps", default=(300, 60), show_default=True, type=(int, int))
@click.option("--seeds", default="0,1,2", callback=_seeds, show_default=True)
@click.option("--threads", type=int)
@click.option("--results", default=RESULTS / "tiny", type=click.Path(path_type=Path))
def tiny(
    target: Path,
    data: Path,
    data_text: Path | None,
    prompts: Path,
    work: Path,
    steps: tuple[int, int],
    seeds: set[int],
    threads: int | None,
    results: Path,
) -> None:
    """One factor at a time on the tiny target: k, passes, forms of mask and softmax, and the data."""
    evaluation = ["--prompts", str(prompts), "--temperature", "0", "--temperature", "1"]
    evaluation += ["--tree", "59,6,10", "--tree", "chain:6", "--max-tokens", "128"]
    evaluation += ["--replay", str(Path(__file__).parent / "outputs" / "tiny.jsonl")]
    common = ["--dtype", "float32", "--vocabulary", "0"]
    common += ["--threads", str(threads)] if threads else []
    study = Study(target, work, results, steps, common, LATER, evaluation)
    study.run(tiny_rows(), {"": data}, seeds)
    if data_text is not None:
        study.run(tiny_rows()[:1], {", original text": data_text}, seeds)


@main.command()
@click.argument("results", type=click.Path(exists=True, path_type=Path))
def table(results: Path) -> None:
    """Write the tables and the picture of finished rows again."""
    write_summary(results)


if __name__ == "__main__":
    main()
