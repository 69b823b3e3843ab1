"""Responses, and prompts too, that the target itself makes: the data of Direct Alignment.

Each is appended to a JSONL file as soon as it is done, prompts a batch at a time, and is not made again.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import click
from tqdm import tqdm

from vllm_griffin.data.chat import ChatTemplate
from vllm_griffin.data.engine import answers, batch_size, complete
from vllm_griffin.whole_file import append_lines

Engine: TypeAlias = Callable[[], Any]  # gives the `vllm.LLM`, made at the first call
_ATTEMPTS = 10  # draws for each prompt that is wanted, at most


@dataclass(frozen=True)
class Sampling:
    """How the target is sampled: `temperatures` are taken in turn by the number of the request."""

    temperatures: tuple[float, ...]
    max_new_tokens: int
    seed: int

    def temperature(self, number: int) -> float:
        """That of a request."""
        return self.temperatures[number % len(self.temperatures)]


@dataclass(frozen=True)
class Request:
    """A prompt of token ids. `id` is its document's, `number` gives it its seed and temperature."""

    id: int
    number: int
    prompt: list[int]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file that this module wrote, but for a last one cut off by a kill.

    Raises:
        click.ClickException: Another line is malformed.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise click.ClickException(f"{path} is damaged ({error}): remove it") from error


def respond(
    llm: Engine, requests: Sequence[Request], sampling: Sampling, path: Path
) -> dict[tuple[int, ...], list[int]]:
    """Let the target answer the requests that have no response in `path` yet, and append them.

    A line is {"id", "temperature", "prompt_token_ids", "response_token_ids"}.

    Returns:
        All responses of the file by prompt.
    """
    responses = _by_prompt(read_lines(path))
    missing = [request for request in requests if tuple(request.prompt) not in responses]
    with tqdm(total=len(requests), initial=len(requests) - len(missing), desc="responses") as bar:
        for row in _answer(llm, missing, sampling):
            append_lines(path, [row])
            responses |= _by_prompt([row])
            bar.update()
    return responses


def _by_prompt(rows: Iterable[dict[str, Any]]) -> dict[tuple[int, ...], list[int]]:
    return {tuple(row["prompt_token_ids"]): row["response_token_ids"] for row in rows}


def _answer(
    llm: Engine, requests: Sequence[Request], sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """Rows of the file, as they come."""
    if not requests:
        # No engine is started for nothing.
        return
    from vllm import SamplingParams

    asked = (
        (
            request.prompt,
            SamplingParams(
                temperature=sampling.temperature(request.number),
                max_tokens=sampling.max_new_tokens,
                seed=sampling.seed + request.number,
                detokenize=False,
            ),
        )
        for request in requests
    )
    for i, answer in answers(llm(), asked):
        yield {
            "id": requests[i].id,
            "temperature": sampling.temperature(requests[i].number),
            "prompt_token_ids": requests[i].prompt,
            "response_token_ids": list(answer.outputs[0].token_ids),
        }


def draw_prompts(
    llm: Engine, template: ChatTemplate, count: int, sampling: Sampling, path: Path
) -> list[str]:
    """Prompts that the target makes by itself, continuing its template where a user's turn begins.

    They are sampled at temperature 1, and stored in `path`, a line {"id", "attempt", "turns"} each. Empty
    ones, those that do not end within the token limit and those drawn before are left out. The result
    is the first `count` usable attempts, interrupted or not.
    """
    rows = read_lines(path)[:count]
    known = {row["turns"][0] for row in rows}
    attempt = rows[-1]["attempt"] + 1 if rows else 0
    with tqdm(total=count, initial=len(rows), desc="prompts") as bar:
        while len(rows) < count and attempt < _ATTEMPTS * count:
            size = min(count - len(rows), batch_size())
            fresh: list[dict[str, Any]] = []
            for i, text in enumerate(_draw(llm, template, size, sampling, attempt)):
                if text and text not in known:
                    known.add(text)
                    number = len(rows) + len(fresh)
                    fresh.append({"id": number, "attempt": attempt + i, "turns": [text]})
            append_lines(path, fresh)
            rows += fresh
            attempt += size
            bar.update(len(fresh))
    if len(rows) < count:
        click.echo(
            f"the target drew {len(rows)} different prompts of {count} in {attempt} attempts",
            err=True,
        )
    return [row["turns"][0] for row in rows]


def _draw(
    llm: Engine, template: ChatTemplate, count: int, sampling: Sampling, first: int
) -> list[str | None]:
    """`count` user turns; None where one did not end."""
    from vllm import SamplingParams

    start, ending = template.user_turn()
    params = [
        SamplingParams(
            temperature=1.0,
            max_tokens=sampling.max_new_tokens,
            seed=sampling.seed + first + i,
            stop=[ending],
            # The ending may be a special token.
            skip_special_tokens=False,
        )
        for i in range(count)
    ]
    outputs = [output.outputs[0] for output in complete(llm(), [start] * count, params)]
    return [o.text.strip() if o.finish_reason == "stop" else None for o in outputs]
