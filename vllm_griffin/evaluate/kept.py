"""Verify steps that an evaluation in the engine has found so far, so that it goes on after a kill.

JSONL, one line for each answer: `{"run", "prompt", "set", "id", "temperature", "steps"}`, where `run` and
`prompt` are digests of what made the steps. Lines of other runs are passed over.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from vllm_griffin.evaluate.prompts import Prompt
from vllm_griffin.evaluate.steps import PromptSteps, Step
from vllm_griffin.whole_file import append_lines, whole_lines


class KeptSteps:
    """The lines of one run."""

    def __init__(self, file: Path, run: Any) -> None:
        """`run` says what decides the steps besides the prompt, as JSON has it."""
        self.file = file
        self._run = _digest(run)

    def read(
        self, wanted: Iterable[tuple[Prompt, float]]
    ) -> dict[tuple[str, int, float], PromptSteps]:
        """What is there of prompts at temperatures, by `PromptSteps.key`.

        Raises:
            ValueError: A line is malformed; it is named by its number.
        """
        prompts = {(p.set, p.id, t): _digest(p.tokens) for p, t in wanted}
        found = {}
        for number, line in whole_lines(self.file):
            try:
                row = json.loads(line)
                key = row["set"], row["id"], row["temperature"]
                if (row["run"], row["prompt"]) == (self._run, prompts.get(key)):
                    found[key] = PromptSteps(*key, [Step(*step) for step in row["steps"]])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.file}, line {number}: not what an evaluation keeps ({error!r}); remove the file"
                ) from error
        return found

    def append(self, prompts: Sequence[Prompt], found: Sequence[PromptSteps]) -> None:
        """Keep the steps of answers to these prompts."""
        append_lines(
            self.file,
            (
                {
                    "run": self._run,
                    "prompt": _digest(prompt.tokens),
                    "set": steps.set,
                    "id": steps.id,
                    "temperature": steps.temperature,
                    "steps": [astuple(step) for step in steps.steps],
                }
                for prompt, steps in zip(prompts, found, strict=True)
            ),
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
