"""The requests of a load run: mixed parameters, lengths, arrival, and clients that leave."""

import json
import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from tests.engine.harness import MODELS, ROOT, Request

Fields = dict[str, Any]
DrawPrompt = Callable[[random.Random], list[int]]
# tokens of a prompt
LONGEST = 64
# What a request may ask for besides its length, temperature and seed. `stop` and the grammar are
# made for source code, which the tiny pair writes.
PARAMETERS: tuple[Fields, ...] = (
    {"temperature": 0.0},
    {},
    {"top_p": 0.9},
    {"top_k": 20},
    {"min_p": 0.05},
    {"top_p": 0.8, "top_k": 30, "min_p": 0.02, "temperature": 1.4},
    {"logprobs": 3},
    {"temperature": 0.0, "logprobs": 1},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.8, "frequency_penalty": 0.4, "temperature": 0.0},
    {"logit_bias": {str(token): 4.0 for token in range(40, 2000, 97)}},
    {"allowed_token_ids": list(range(4, 2000, 3))},
    {"stop": [",", ")"], "ignore_eos": False},
    {"stop_token_ids": list(range(5, 2000, 23)), "min_tokens": 3},
    {"n": 2},
    {"bad_words": [" self", ")"]},
    {"structured_outputs": {"regex": r"(def|if|for) [a-z_]+[:(]"}, "ignore_eos": False},
)


@dataclass(frozen=True)
class Visit:
    """One client: what it asks for, and how it behaves.

    Attributes:
        body: fields of a completion request.
        pause: seconds between the client before and this one.
        leaves: after so many chunks of its stream, or seconds of waiting for a whole answer;
            None if the client stays.
    """

    name: str
    body: Fields
    pause: float
    leaves: float | None = None

    @property
    def stream(self) -> bool:
        """Whether the answer comes in chunks."""
        return bool(self.body["stream"])

    def request(self) -> Request:
        """The same for an engine without a server, with the server's own sampling parameters."""
        parsed = CompletionRequest(**self.body | {"stream": False})
        params = parsed.to_sampling_params(self.body["max_tokens"])
        return Request(self.name, self.body["prompt"], params)


def source_code(target: Path, shortest: int = 8) -> DrawPrompt:
    """Pieces of up to LONGEST tokens of source files that the tiny pair was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / name for name in (MODELS / "heldout.txt").read_text().split()]
    texts = [file.read_text() for file in files if file.is_file()]
    tokens = [t for text in texts for t in tokenizer(text, add_special_tokens=False)["input_ids"]]

    def piece(draw: random.Random) -> list[int]:
        length, start = draw.randint(shortest, LONGEST), draw.randrange(len(tokens) - LONGEST)
        return tokens[start : start + length]

    return piece


def chats(target: Path) -> DrawPrompt:
    """First turns of the chat prompts that the examples bring, those of up to LONGEST tokens."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts: list[list[int]] = []
    for file in sorted((ROOT / "examples" / "prompts").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            turn = {"role": "user", "content": json.loads(line)["turns"][0]}
            prompts.append(
                tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_dict=False)
            )
    short = [prompt for prompt in prompts if len(prompt) <= LONGEST]
    return lambda draw: draw.choice(short)


def visits(
    prompt: DrawPrompt,
    count: int,
    seed: int,
    leaving: float = 0.0,
    outputs: tuple[int, int] = (8, 24),
) -> list[Visit]:
    """So many clients, the same ones for the same arguments; `leaving` changes nothing but who leaves.

    Args:
        prompt: draws one; every eighth client's begins like an earlier one.
        leaving: share of the clients that leave early.
        outputs: least and most tokens.
    """
    draw, leave = random.Random(seed), random.Random(seed + 1)
    found: list[Visit] = []
    for i in range(count):
        tokens = prompt(draw)
        if found and draw.random() < 0.125:
            tokens = [*draw.choice(found).body["prompt"], *tokens][:LONGEST]
        body = {
            "model": "target",
            "prompt": tokens,
            "max_tokens": draw.randint(*outputs),
            "temperature": draw.choice((0.0, 0.5, 1.0, 1.0)),
            "seed": draw.randrange(1 << 40),
            "ignore_eos": True,
            "stream": draw.random() < 0.5,
            "return_token_ids": True,
        } | draw.choice(PARAMETERS)
        if body["temperature"] == 0.0:
            # A greedy request has one completion.
            body.pop("n", None)
        # Bursts and calm by turns.
        pause = 0.0 if i // 50 % 2 else draw.expovariate(20)
        leaves = None
        if leave.random() < leaving:
            leaves = leave.randint(0, 3) if body["stream"] else leave.uniform(0, 2)
        found.append(Visit(f"v{i}", body, pause, leaves))
    return found
