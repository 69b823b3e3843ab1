"""Documents from records: which tokens they have, which of them are the assistant's, and what is left out."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_griffin.data.chat import ChatTemplate
from vllm_griffin.data.documents import Document
from vllm_griffin.data.respond import Request
from vllm_griffin.data.settings import Settings
from vllm_griffin.data.sources import Chat, Problems, Record, Text, Tokens, read_records


class Builder:
    """Makes documents, and counts what was left out or cut on the way."""

    def __init__(self, s: Settings, tokenizer: Any, vocabulary: int, problems: Problems) -> None:
        """Take settings with `max_length` set; `vocabulary` is one more than the largest token id."""
        assert s.max_length is not None
        self.tokenizer = tokenizer
        self._settings = s
        self._max_length = s.max_length
        self._vocabulary = vocabulary
        self._problems = problems
        self._excluded = self._cut = self._repeated = 0

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The target's chat template."""
        return ChatTemplate(self.tokenizer)

    def counts(self, documents: Sequence[Document]) -> dict[str, int]:
        """What was made and what was left out, for ``data.json``."""
        return {
            "documents": len(documents),
            "prompts": len({d.id for d in documents}),
            "tokens": sum(len(d.tokens) for d in documents),
            "assistant_tokens": sum(b - a for d in documents for a, b in d.answer),
            "held_out_documents": sum(d.held_out for d in documents),
            "cut_documents": self._cut,
            "excluded_prompts": self._excluded,
            "repeated_prompts": self._repeated,
            "skipped": self._problems.count,
        }

    def without_excluded(self, records: Sequence[Record]) -> list[Record]:
        """Records none of whose prompts is one of the files to exclude."""
        prompts = self._excluded_prompts(self._settings.exclude)
        kept = [record for record in records if prompts.isdisjoint(self._prompts(record))]
        self._excluded += len(records) - len(kept)
        return kept

    def _excluded_prompts(self, paths: Sequence[Path]) -> set[Any]:
        found: set[Any] = set()
        for record in read_records(paths, None, self._problems):
            found.update(self._prompts(record))
            if isinstance(record.content, Chat) and self.tokenizer.chat_template:
                found.add(tuple(self.template.prompt(record.content.opening)))
        return found

    def _prompts(self, record: Record) -> Iterator[Any]:
        """What is compared: texts without surrounding space, token ids of prompts."""
        match record.content:
            case Chat(messages):
                yield from (m["content"].strip() for m in messages if m["role"] == "user")
            case Tokens(prompt):
                yield tuple(prompt)
            case Text(text):
                yield text.strip()

    def given(self, records: Sequence[Record]) -> list[Document]:
        """Documents with the answers that the records give."""
        documents = []
        for record in records:
            try:
                documents += list(self._documents(record))
            except ValueError as error:
                self._problems.add(record.where, error)
        return documents

    def _documents(self, record: Record) -> Iterator[Document]:
        match record.content:
            case Chat(messages):
                tokens, spans = self.template.document(messages)
                yield self._fitted(record.id, tokens, spans)
            case Tokens(prompt, response):
                span = (len(prompt), len(prompt) + len(response))
                yield self._fitted(record.id, prompt + response, [span])
            case Text(text):
                for piece in self._pieces(text):
                    yield Document(record.id, piece, [(0, len(piece))])

    def _pieces(self, text: str) -> Iterator[list[int]]:
        length = min(self._settings.length or self._max_length, self._max_length)
        tokens = self.tokenizer(text, verbose=False)["input_ids"]
        self._check_ids(tokens)
        for start in range(0, len(tokens), length):
            piece = tokens[start : start + length]
            if len(piece) > 2:  # fewer have nothing to predict
                yield piece

    def _check_ids(self, tokens: Sequence[int]) -> None:
        """Refuse what the target's embedding lacks; a tokenizer may have more tokens.

        Raises:
            ValueError: Names the first such token.
        """
        wrong = next((t for t in tokens if not 0 <= t < self._vocabulary), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} is outside the target's {self._vocabulary}")

    def _fitted(self, number: int, tokens: list[int], spans: list[tuple[int, int]]) -> Document:
        self._check_ids(tokens)
        length = self._max_length
        if len(tokens) > length:
            spans = [(a, min(b, length)) for a, b in spans if a < length]
            if not spans:
                raise ValueError(f"its answer begins after {length} tokens (--max-length)")
            self._cut += 1
        return Document(number, tokens[:length], spans)

    def requests(self, records: Sequence[Record]) -> list[Request]:
        """What the target is asked to answer: each different prompt once, with room for an answer."""
        found: dict[tuple[int, ...], Request] = {}
        for record in records:
            try:
                prompts = list(self._openings(record))
            except ValueError as error:
                self._problems.add(record.where, error)
                continue
            for prompt in prompts:
                if tuple(prompt) in found:
                    self._repeated += 1
                    continue
                # Pieces of one text share its id, but take turns like prompts.
                number = len(found) if isinstance(record.content, Text) else record.id
                found[tuple(prompt)] = Request(record.id, number, prompt)
        return list(found.values())

    def _openings(self, record: Record) -> Iterator[list[int]]:
        match record.content:
            case Chat() as chat:
                yield self._with_room(self.template.prompt(chat.opening))
            case Tokens(prompt):
                yield self._with_room(prompt)
            case Text(text):
                for piece in self._pieces(text):
                    yield self._with_room(piece[: self._settings.prompt_tokens])

    def _with_room(self, prompt: list[int]) -> list[int]:
        self._check_ids(prompt)
        if len(prompt) >= self._max_length:
            raise ValueError(f"its {len(prompt)} tokens leave no room for an answer (--max-length)")
        return prompt

    def generated(
        self, requests: Sequence[Request], responses: dict[tuple[int, ...], list[int]]
    ) -> list[Document]:
        """Documents with the answers that the target gave."""
        return [
            self._fitted(
                request.id,
                request.prompt + response,
                [(len(request.prompt), len(request.prompt) + len(response))],
            )
            for request in requests
            for response in [responses[tuple(request.prompt)]]
            if response
        ]
