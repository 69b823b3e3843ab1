"""What the engine without speculation gives for the same requests, and the comparison with it."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.engine.compare import TOLERANCE
from tests.engine.harness import NEAR_TIE, Outcome, engine, run
from tests.engine.ties import recorded_gaps
from tests.load.client import Answer, Choice
from tests.load.traffic import Visit


@dataclass
class Expected:
    """One request's completions, and how close the plain engine's decision was at each token."""

    choices: list[Choice]
    gaps: list[list[float]]


@dataclass
class Verdict:
    """What became of all clients of a run."""

    requests: int = 0
    complete: int = 0
    left: int = 0
    wrong: int = 0
    near_ties: int = 0
    lost: int = 0
    hung: int = 0
    tokens: int = 0
    # the first few of what was wrong or lost, in words
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Nothing wrong, lost or hung."""
        return not (self.wrong or self.lost or self.hung)

    def note(self, text: str) -> None:
        """Keeps it if there are not many yet."""
        if len(self.notes) < 20:
            self.notes.append(text)


def expected(pair: str, visits: Sequence[Visit], **settings: Any) -> dict[str, Expected]:
    """Runs the requests in an engine without speculation, in this process.

    Args:
        pair: one of the harness's PAIRS.
        settings: of the engine; a cache that is large enough, whatever the server's is.
    """
    requests = [v.request() for v in visits]
    with recorded_gaps() as gaps, engine(pair, skip_tokenizer_init=False, **settings) as llm:
        outcome = run(llm, requests)
    return {r.name: _expected(r.name, len(r.prompt), outcome, gaps) for r in requests}


def _expected(
    name: str, prompt: int, outcome: Outcome, gaps: Mapping[tuple[str, int], float]
) -> Expected:
    choices, close = [], []
    completions = outcome.outputs[name].outputs
    for c in sorted(completions, key=lambda c: c.index):
        tokens = list(c.token_ids)
        scores = [c.logprobs[at][t].logprob for at, t in enumerate(tokens)] if c.logprobs else []
        choices.append(Choice(tokens, c.text, c.finish_reason, scores))
        key = name if len(completions) == 1 else f"{c.index}_{name}"
        # The last one is the decision after the text's end, which nobody made.
        close.append([gaps.get((key, prompt + at - 1), math.inf) for at in range(len(tokens))])
    return Expected(choices, close)


def kept(path: Path, pair: str, visits: Sequence[Visit], **settings: Any) -> dict[str, Expected]:
    """`expected`, kept in a file for runs of the same requests."""
    asked = json.dumps([pair, settings, [v.body for v in visits]])
    key = hashlib.sha256(asked.encode()).hexdigest()
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["key"] == key:
            return {
                name: Expected([Choice(**c) for c in e["choices"]], e["gaps"])
                for name, e in stored["requests"].items()
            }
    found = expected(pair, visits, **settings)
    requests = {
        name: {"choices": [vars(c) for c in e.choices], "gaps": e.gaps} for name, e in found.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"key": key, "requests": requests}))
    return found


def judge(
    visits: Sequence[Visit], answers: Mapping[str, Answer], wanted: Mapping[str, Expected]
) -> Verdict:
    """Counts; of a client that left, what it had seen must be how the expected answer begins."""
    verdict = Verdict()
    for visit in visits:
        answer = answers[visit.name]
        verdict.requests += 1
        setattr(verdict, answer.end, getattr(verdict, answer.end) + 1)
        verdict.tokens += sum(len(c.tokens) for c in answer.choices.values())
        if answer.end in ("lost", "hung"):
            verdict.note(f"{visit.name} {answer.end}: {answer.error}")
            continue
        what, gap = difference(wanted[visit.name], answer)
        if what and gap < NEAR_TIE:
            verdict.near_ties += 1
        elif what:
            verdict.wrong += 1
            verdict.note(f"{visit.name} {visit.body}: {what}, gap {gap:.1e}")
    return verdict


def difference(wanted: Expected, answer: Answer) -> tuple[str, float]:
    """What differs first ("" for nothing), and the plain engine's gap at that token."""
    whole = answer.end == "complete"
    if whole and len(answer.choices) != len(wanted.choices):
        return f"{len(answer.choices)} completions", math.inf
    for index, found in answer.choices.items():
        what, at = _differs(wanted.choices[index], found, whole)
        if what:
            gaps = wanted.gaps[index]
            return f"completion {index}: {what}", gaps[at] if at < len(gaps) else math.inf
    return "", math.inf


def _differs(wanted: Choice, found: Choice, whole: bool) -> tuple[str, int]:
    """What differs first, and at which token; only tokens can be excused by a near-tie."""
    tokens = wanted.tokens if whole else wanted.tokens[: len(found.tokens)]
    if found.tokens != tokens:
        pairs = zip(tokens, found.tokens, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(found.tokens))
        return f"token {at}, {found.tokens} instead of {tokens}", at
    never = len(wanted.tokens)
    if not (found.text == wanted.text if whole else wanted.text.startswith(found.text)):
        return f"text {found.text!r} instead of {wanted.text!r}", never
    if whole and found.finish_reason != wanted.finish_reason:
        return f"finish reason {found.finish_reason} instead of {wanted.finish_reason}", never
    scores = wanted.logprobs if whole else wanted.logprobs[: len(found.logprobs)]
    if len(scores) != len(found.logprobs) or any(
        abs(a - b) > TOLERANCE for a, b in zip(scores, found.logprobs, strict=True)
    ):
        return f"log-probabilities {found.logprobs} instead of {scores}", never
    return "", never
