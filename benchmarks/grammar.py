"""Structured outputs of SmolLM2 with its draft: do any leave their grammar, or differ from plain ones?

    VLLM_GRIFFIN_CPU=1 python benchmarks/grammar.py --output docs/results/grammar.json

500 requests (JSON schema, regex, choice, EBNF grammar, named and required tool calls; greedy and seeded by
turns): 450 with trees of 12 nodes, 50 with 59, and all of them without speculation. A cut run goes on where
it was: finished outputs wait in a file beside the result. Exits with 1 if an output leaves its grammar.
"""

import collections
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import jsonschema
import regex
import xgrammar
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.utils import choice_as_grammar

from vllm_griffin import provenance
from vllm_griffin.evaluate.prompts import encode
from vllm_griffin.pretrained import smollm2_instruct
from vllm_griffin.whole_file import write_json

DRAFT = Path(__file__).parents[1] / "examples" / "models" / "smollm2-griffin"
MAX_TOKENS = 32
SMALL, LARGE = 450, 50
CHUNK = 25
TREES: dict[int, dict[str, Any]] = {
    12: {"num_speculative_tokens": 12, "tree_depth": 4, "tree_top_k": 4},
    59: {"num_speculative_tokens": 59, "tree_depth": 6, "tree_top_k": 10},
}

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 20},
        "student": {"type": "boolean"},
    },
    "required": ["name", "age", "city", "student"],
    "additionalProperties": False,
}
DATE = r"On (Monday|Tuesday|Friday), [A-Z][a-z]{2,8} [1-3]?[0-9], I (went|drove|walked) to the [a-z]{3,12}\."
MOODS = ["very positive", "somewhat positive", "neutral", "somewhat negative", "very negative"]
SQL = """root ::= "SELECT " columns " FROM " name (" WHERE " name " = " value)? ";"
columns ::= name (", " name)*
name ::= [a-z] [a-z_]*
value ::= [0-9]+ | "'" [a-z ]* "'"
"""
# The same language, for a judge of its own.
SQL_NAME = "[a-z][a-z_]*"
SQL_PATTERN = (
    f"SELECT {SQL_NAME}(, {SQL_NAME})* FROM {SQL_NAME}( WHERE {SQL_NAME} = ([0-9]+|'[a-z ]*'))?;"
)
TOOLS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "add": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
SUBJECTS = (
    "a teacher from Lyon",
    "an old sailor",
    "my sister's holiday",
    "the orders of March",
    "a film about bees",
    "a train to Madrid",
    "a rainy week in Oslo",
    "17 apples and 25 pears",
    "the new library",
    "a student of law",
    "prices in Cairo",
    "a long walk",
    "a broken phone",
)
ASKS = {
    "json": "Describe a person as JSON with name, age, city and student. Think of {}.",
    "regex": "Write one sentence about what you did. It has to do with {}.",
    "choice": "How does one feel about {}? Answer with a mood only.",
    "grammar": "Write a short SQL query about {}.",
    "named_tool": "What is the weather where this is: {}? Call get_weather(city, unit).",
    "required_tool": "Call get_weather(city, unit) or add(a, b) to find out about {}.",
}
KINDS = tuple(ASKS)


def constraint(kind: str, tokenizer: Any) -> StructuredOutputsParams:
    """What the engine is asked for; tool calls by way of the OpenAI server's own request parser."""
    match kind:
        case "json":
            return StructuredOutputsParams(json=json.dumps(PERSON))
        case "regex":
            return StructuredOutputsParams(regex=DATE)
        case "choice":
            return StructuredOutputsParams(choice=list(MOODS))
        case "grammar":
            return StructuredOutputsParams(grammar=SQL)
    named = {"type": "function", "function": {"name": "get_weather"}}
    request = ChatCompletionRequest(
        messages=[{"role": "user", "content": "-"}],
        tools=[
            {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
            for name, schema in TOOLS.items()
        ],
        tool_choice=named if kind == "named_tool" else "required",
    )
    parser = ParserManager.get_parser(tool_parser_name="hermes", enable_auto_tools=True)
    request = parser(tokenizer, request.tools).adjust_request(request)
    return request.to_sampling_params(MAX_TOKENS, {}).structured_outputs


def request(index: int, tokenizer: Any) -> tuple[list[int], SamplingParams]:
    """Prompt tokens and parameters of one of the 500."""
    kind, turn = KINDS[index % len(KINDS)], index // len(KINDS)
    ask = ASKS[kind].format(SUBJECTS[turn % len(SUBJECTS)])
    prompt = encode(ask, tokenizer)
    sampling = {"temperature": 0} if turn % 2 else {"temperature": 1.0, "seed": index}
    params = SamplingParams(
        max_tokens=MAX_TOKENS,
        structured_outputs=constraint(kind, tokenizer),
        skip_special_tokens=False,
        **sampling,
    )
    return prompt, params


class Judge:
    """Tells whether an output is in its grammar: a matcher of its own, and an ordinary parser."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
        compiler = xgrammar.GrammarCompiler(info)
        tools = {
            k: constraint(k, tokenizer).structural_tag for k in ("named_tool", "required_tool")
        }
        self.compiled = {
            "json": compiler.compile_json_schema(json.dumps(PERSON)),
            "regex": compiler.compile_regex(DATE),
            "choice": compiler.compile_grammar(choice_as_grammar(MOODS)),
            "grammar": compiler.compile_grammar(SQL),
            **{kind: compiler.compile_structural_tag(tag) for kind, tag in tools.items()},
        }
        self.eos = tokenizer.eos_token_id
        self.end = tokenizer.eos_token

    def fault(self, kind: str, tokens: list[int], text: str, complete: bool) -> str | None:
        """Why the output is outside, or None."""
        matcher = xgrammar.GrammarMatcher(self.compiled[kind], override_stop_tokens=[self.eos])
        for at, token in enumerate(tokens):
            if not matcher.accept_token(token):
                return f"token {at} leaves the grammar"
        if complete != matcher.is_terminated():
            return "ended by itself before the grammar did" if complete else "went on past the end"
        text = text.removesuffix(self.end)
        try:
            return None if getattr(self, f"_{kind}")(text, complete) else "does not parse"
        except (ValueError, jsonschema.ValidationError) as error:
            return str(error).splitlines()[0]

    def _json(self, text: str, complete: bool) -> bool:
        if complete:
            jsonschema.validate(json.loads(text), PERSON)
        return text.lstrip()[:1] in ("", "{")

    def _regex(self, text: str, complete: bool) -> bool:
        return bool(regex.fullmatch(DATE, text, partial=not complete))

    def _choice(self, text: str, complete: bool) -> bool:
        return text in MOODS if complete else any(mood.startswith(text) for mood in MOODS)

    def _grammar(self, text: str, complete: bool) -> bool:
        return bool(regex.fullmatch(SQL_PATTERN, text, partial=not complete))

    def _named_tool(self, text: str, complete: bool) -> bool:
        return self._calls(text, complete, ["get_weather"], most=1)

    def _required_tool(self, text: str, complete: bool) -> bool:
        return self._calls(text, complete, list(TOOLS), most=len(text))

    def _calls(self, text: str, complete: bool, names: list[str], most: int) -> bool:
        """Calls one after the other, each with valid arguments; the last may be cut."""
        calls = re.findall(r"<tool_call>\n?(.*?)\n?</tool_call>", text, re.DOTALL)
        for call in map(json.loads, calls):
            if call["name"] not in names:
                return False
            jsonschema.validate(call["arguments"], TOOLS[call["name"]])
        rest = re.sub(r"<tool_call>.*?</tool_call>", "", text, flags=re.DOTALL)
        begun = "<tool_call>".startswith(rest[:11])
        return (1 <= len(calls) <= most and not rest) if complete else len(calls) <= most and begun


@contextmanager
def timed_bitmasks() -> Iterator[list[float]]:
    """Seconds of each request's bitmask of a step, as the scheduler fills it."""
    from vllm_griffin.grammar import GrammarTree

    fill, seconds = GrammarTree.fill, []

    def timed(self: GrammarTree, rows: Any) -> None:
        began = time.perf_counter()
        fill(self, rows)
        seconds.append(time.perf_counter() - began)

    with mock.patch.object(GrammarTree, "fill", timed):
        yield seconds


def counters(llm: LLM) -> collections.Counter:
    """vLLM's own counts of verify steps and of accepted tokens."""
    names = ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")
    return collections.Counter(
        {m.name.rpartition("num_")[2]: m.value for m in llm.get_metrics() if m.name in names}
    )


def run(nodes: int, todo: list[list[int]], deadline: float, partial: Path) -> bool:
    """Runs chunks of requests with trees of so many nodes (0: without); False: time is over."""
    target = str(smollm2_instruct())
    speculative = {"method": "griffin", "model": str(DRAFT), **TREES[nodes]} if nodes else None
    llm = LLM(
        model=target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        disable_log_stats=False,
        seed=0,
        speculative_config=speculative,
    )
    tokenizer = llm.get_tokenizer()
    for chunk in todo:
        if time.monotonic() > deadline:
            return False
        prompts, params = zip(*(request(i, tokenizer) for i in chunk), strict=True)
        before, began = counters(llm), time.perf_counter()
        with timed_bitmasks() as fills:
            outputs = llm.generate(
                [{"prompt_token_ids": p} for p in prompts], list(params), use_tqdm=False
            )
        record = {
            "nodes": nodes,
            "seconds": round(time.perf_counter() - began, 2),
            "counters": counters(llm) - before,
            "bitmask_seconds": [round(s, 6) for s in fills],
            "outputs": {
                i: [list(o.outputs[0].token_ids), o.outputs[0].text, o.outputs[0].finish_reason]
                for i, o in zip(chunk, outputs, strict=True)
            },
        }
        with partial.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{nodes} nodes: {len(chunk)} outputs in {record['seconds']} s", flush=True)
    return True


def chunks(nodes: int) -> list[list[int]]:
    """The requests of one tree size, in pieces."""
    every = {12: range(SMALL), 59: range(SMALL, SMALL + LARGE), 0: range(SMALL + LARGE)}[nodes]
    return [list(every[i : i + CHUNK]) for i in range(0, len(every), CHUNK)]


def summary(records: list[dict[str, Any]], nodes: int, judge: Judge, plain: dict) -> dict[str, Any]:
    """Counts of one tree size; ``plain``: request -> tokens without speculation."""
    mine = [r for r in records if r["nodes"] == nodes]
    outputs = {i: o for r in mine for i, o in r["outputs"].items()}
    faults, differ = [], []
    kinds: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for i, (tokens, text, reason) in outputs.items():
        kind = KINDS[int(i) % len(KINDS)]
        fault = judge.fault(kind, tokens, text, reason == "stop")
        if fault:
            faults.append({"request": i, "kind": kind, "fault": fault, "text": text})
        if tokens != plain[i]:
            differ.append({"request": i, "kind": kind, "text": text})
        kinds[kind].update({"outputs": 1, "complete": reason == "stop", "outside": bool(fault)})
    counts = sum((collections.Counter(r["counters"]) for r in mine), collections.Counter())
    fills = sorted(s for r in mine for s in r["bitmask_seconds"])
    found = {
        "nodes": nodes,
        "outputs": len(outputs),
        "outside_the_grammar": faults,
        "differ_from_plain": differ,
        "kinds": kinds,
        "tokens": sum(len(tokens) for tokens, *_ in outputs.values()),
        "seconds": round(sum(r["seconds"] for r in mine), 1),
    }
    if nodes:
        found["acceptance_length"] = round(1 + counts["accepted_tokens"] / counts["drafts"], 3)
        found["bitmask_milliseconds"] = {
            "median": round(1e3 * fills[len(fills) // 2], 3),
            "p99": round(1e3 * fills[int(0.99 * len(fills))], 3),
        }
    return found


@click.command()
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="JSON file to write."
)
@click.option("--seconds", default=float("inf"), help="Start no further piece after so long.")
def main(output: Path, seconds: float) -> None:
    """Runs what is left to run, then judges all outputs."""
    deadline = time.monotonic() + seconds
    partial = output.with_suffix(".partial.jsonl")
    described = provenance.describe(seed=0)
    for nodes in (12, 59, 0):
        done = [list(map(int, r["outputs"])) for r in _read(partial) if r["nodes"] == nodes]
        todo = [chunk for chunk in chunks(nodes) if chunk not in done]
        if todo and not run(nodes, todo, deadline, partial):
            print("more is left: run the command again")
            sys.exit(2)
    records = _read(partial)
    judge = Judge(AutoTokenizer.from_pretrained(smollm2_instruct()), vocab_size=49152)
    plain = {i: o[0] for r in records if r["nodes"] == 0 for i, o in r["outputs"].items()}
    rows = [summary(records, nodes, judge, plain) for nodes in (12, 59, 0)]
    write_json(output, {**described, "max_tokens": MAX_TOKENS, "batch": 8, "rows": rows})
    for row in rows:
        print(json.dumps({k: len(v) if isinstance(v, list) else v for k, v in row.items()}))
    partial.unlink()
    sys.exit(any(row["outside_the_grammar"] for row in rows))


def _read(partial: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in partial.read_text().splitlines()] if partial.exists() else []


if __name__ == "__main__":
    # The bitmasks are timed where they are filled, so that has to be this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main()
