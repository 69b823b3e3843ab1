"""Chats as tokens: the target's own chat template, and which tokens are the assistant's."""

import re
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import click
from jinja2 import TemplateError

from vllm_griffin.data.sources import Message

Spans = list[tuple[int, int]]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "QQUSERTURNQQ"
# For templates that name today's date: the same text must be the same prompt tomorrow. It is the date that
# those of Llama 3 have where there is no clock.
_TODAY = datetime(2024, 7, 26)


def fixed_clock(form: str) -> str:
    """What `strftime_now` is for chat templates: a date that does not pass."""
    return _TODAY.strftime(form)


def load_tokenizer(target: str, template: Path | None = None) -> Any:
    """The target's tokenizer; `template` is a file with the chat template to use in place of its own.

    Raises:
        click.ClickException: There is no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"no tokenizer of {target}: {error}") from error
    if template is not None:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        """Take the template.

        Raises:
            click.ClickException: The tokenizer has none, or cannot say which characters a token covers.
        """
        if not tokenizer.chat_template:
            raise click.ClickException(
                "the target has no chat template, which prompts and chats need: give one with "
                "--chat-template FILE, or train on text or token ids"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise click.ClickException(
                f"{type(tokenizer).__name__} does not say which characters its tokens cover; chats need "
                "a tokenizer with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._marked = bool(_GENERATION.search(tokenizer.get_chat_template()))
        # What can end a turn: EOS, and special tokens such as <|eot_id|> where EOS is another.
        self._ends = set(tokenizer.all_special_ids)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Tokens of a conversation that the assistant is to answer.

        Raises:
            ValueError: The template refuses it.
        """
        tokens: list[int] = self._encode(self._render(messages, True))["input_ids"]
        return tokens

    def document(self, messages: list[Message]) -> tuple[list[int], Spans]:
        """Tokens of a conversation, and the ranges [a, b) of them that are the assistant's.

        They are what the template marks with ``{% generation %}``; if it marks nothing, what a turn of the
        assistant adds to the rendering up to there with the generation prompt, as far as the token that
        ends the turn. Turns that later ones change (templates that drop earlier thoughts) have none. Turns
        after the assistant's last one are left out.

        Raises:
            ValueError: There is no turn of the assistant, or none can be told.
        """
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            raise ValueError("no answer of an assistant (--generate makes one)")
        messages = messages[: len(roles) - roles[::-1].index("assistant")]
        tokens, spans = self._by_mark(messages) if self._marked else self._by_prefix(messages)
        if not spans:
            raise ValueError("the chat template marks no token as the assistant's")
        return tokens, spans

    def user_turn(self) -> tuple[list[int], str]:
        """Tokens up to where the first user's turn begins, and the text with which it ends.

        Raises:
            click.ClickException: The template does not render a user's turn as it is.
        """
        text = self._render([{"role": "user", "content": _MARK}], True)
        before, found, after = text.partition(_MARK)
        ending = next((line.strip() for line in after.splitlines() if line.strip()), "")
        if not found or not ending:
            raise click.ClickException("the chat template does not show where a user's turn ends")
        return self._encode(before)["input_ids"], ending

    def _render(self, messages: list[Message], generation: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation,
                strftime_now=fixed_clock,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return text

    def _encode(self, text: str) -> Any:
        return self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )

    def _by_mark(self, messages: list[Message]) -> tuple[list[int], Spans]:
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages,
                return_dict=True,
                return_assistant_tokens_mask=True,
                strftime_now=fixed_clock,
                tokenizer_kwargs={"verbose": False},
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {error}") from error
        return encoded["input_ids"], _runs(encoded["assistant_masks"])

    def _by_prefix(self, messages: list[Message]) -> tuple[list[int], Spans]:
        whole = self._render(messages, False)
        encoded = self._encode(whole)
        tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
        spans = []
        untold = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], True)
            after = self._render(messages[: i + 1], False)
            if not (whole.startswith(after) and after.startswith(before)):
                untold = i + 1
                continue
            a, b = (_first_from(offsets, len(text)) for text in (before, after))
            # What the template adds after the end of a turn is never generated.
            ends = [j for j in range(a, b) if tokens[j] in self._ends]
            b = ends[-1] + 1 if ends else b
            if a < b:
                spans.append((a, b))
        if untold and not spans:
            raise ValueError(
                f"the chat template renders the conversation up to turn {untold} otherwise than as the "
                "beginning of the whole, so the assistant's tokens cannot be told: with --generate the "
                "target answers the first turn itself"
            )
        return tokens, spans


def _first_from(offsets: list[tuple[int, int]], character: int) -> int:
    """The first token that begins at `character` or later."""
    return next((i for i, (begin, _) in enumerate(offsets) if begin >= character), len(offsets))


def _runs(mask: list[int]) -> Spans:
    """Ranges [a, b) of ones."""
    spans, at = [], 0
    for value, group in groupby(mask):
        length = len(list(group))
        if value:
            spans.append((at, at + length))
        at += length
    return spans
