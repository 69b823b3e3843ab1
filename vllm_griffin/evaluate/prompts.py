"""Prompt sets: the first turns of JSONL files, as token ids of the target."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from vllm_griffin.data.chat import fixed_clock


@dataclass(frozen=True)
class Prompt:
    """One first turn. `id` is the question's number, which also seeds its sampling."""

    set: str
    id: int
    tokens: list[int]


def read_first_turns(path: Path, limit: int | None = None) -> list[tuple[int, str]]:
    """Numbers and texts of a JSONL file with `turns` (a list of strings) or `prompt` (a string).

    The number is `question_id`, else `id` if that is a number, else the line's place from 0. Empty lines are
    passed over.

    Raises:
        ValueError: A line is malformed or repeats a number; it is named by its number, from 1.
    """
    turns: dict[int, str] = {}
    with open(path, encoding="utf-8-sig") as lines:
        for place, line in enumerate(lines):
            if limit is not None and len(turns) == limit:
                break
            if not line.strip():
                continue
            try:
                number, text = _first_turn(json.loads(line), place)
                if number in turns:
                    raise ValueError(f"question {number} is there twice")
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {place + 1}: {error}") from error
            turns[number] = text
    if not turns:
        raise ValueError(f"{path} has no prompts")
    return list(turns.items())


def _first_turn(row: Any, place: int) -> tuple[int, str]:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    turns = row.get("turns", row.get("prompt"))
    text = turns[0] if isinstance(turns, list) and turns else turns
    if not isinstance(text, str) or not text:
        raise ValueError('no "turns": ["..."] and no "prompt": "..."')
    # JSON can hold half a surrogate pair, which is no text and raises a ValueError here.
    text.encode()
    own = row.get("id")
    # An `id` may be a name, as in many data sets; a `question_id` is a number.
    number: Any = row.get("question_id", own if isinstance(own, int) else place)
    return int(number), text


def load_prompts(paths: list[Path], tokenizer: Any, limit: int | None = None) -> list[Prompt]:
    """First turns of some files as token ids; a set is named after its file.

    Args:
        paths: JSONL files; see `read_first_turns`.
        tokenizer: The target's (Hugging Face). With a chat template the turn is one user turn and the
            answer begins; without one the text is taken as it is.
        limit: Only the first so many prompts of each file.

    Raises:
        ValueError: A malformed line, or two files of one name.
    """
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"prompt files need different names, not {', '.join(names)}")
    return [
        Prompt(path.stem, number, encode(text, tokenizer))
        for path in paths
        for number, text in read_first_turns(path, limit)
    ]


def encode(text: str, tokenizer: Any) -> list[int]:
    """Token ids of one user turn by the chat template, or of the text where there is none.

    Raises:
        ValueError: The template refuses it.
    """
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": text}]
        try:
            encoded = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=True, strftime_now=fixed_clock
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses a prompt: {error}") from error
        return list(encoded["input_ids"])
    return list(tokenizer(text)["input_ids"])
