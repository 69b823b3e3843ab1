"""The model card of a draft's folder: what it is, what it was trained on, how good it is, how to serve it."""

import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_griffin.markdown import code_block, figure, table
from vllm_griffin.model.checkpoint import DraftCheckpoint
from vllm_griffin.model.config import PAPER_TREE, read_json
from vllm_griffin.model.layout import EMBEDDING
from vllm_griffin.model.speculators import HUB_ID, verifier_of
from vllm_griffin.provenance import HOME
from vllm_griffin.report import Row, read_run
from vllm_griffin.whole_file import whole_file

ROW_KEYS = (
    "draft",
    "prompts_of",
    "prompts",
    "temperature",
    "tree",
    "acceptance_length",
    "acceptance_length_95",
    "per_depth",
    "steps",
)
HELD_OUT_ROWS = (
    ("val_agree", "best token is the target's"),
    ("val_token", "soft cross-entropy"),
    ("val_feature", "feature loss (smooth L1)"),
)


def write_card(
    draft_folder: Path, evaluation: Path | None = None, *, name: str | None = None
) -> None:
    """Write `README.md` of a draft's folder; the same files give the same bytes.

    It draws on `config.json` and the weights' headers, and on `run.json` and `log.jsonl` (of training) and
    `provenance.json` (of a conversion) where they are. A card that is there is replaced; a `license:` in
    its front matter stays.

    Args:
        draft_folder: The draft.
        evaluation: JSON of `vllm-griffin eval`; its rows of this draft are shown.
        name: What the card calls the folder in commands; the folder as given if None.

    Raises:
        CheckpointError: The draft, or a file beside it, cannot be read.
        ValueError: The evaluation lacks a key, or has no row of this draft; or a log is malformed.
    """
    draft = DraftCheckpoint.open(draft_folder)
    run, conversion = (_optional(draft_folder / f) for f in ("run.json", "provenance.json"))
    config_file = draft_folder / "config.json"
    target = verifier_of(read_json(config_file), str(config_file))
    serves_alone = target is not None
    target = target or conversion.get("target") or run.get("target")
    name = name or _relative(draft_folder)
    lines = [*_front_matter(draft, target, _license(draft_folder)), *_introduction(draft, target)]
    lines += _training(run) if run else []
    if (draft_folder / "log.jsonl").is_file():
        lines += _held_out(read_run(draft_folder, name).best)
    lines += _conversion(conversion) if conversion else []
    if evaluation is not None:
        lines += _evaluation(evaluation, draft_folder)
    lines += _serving(target or "TARGET", name, serves_alone)
    text = HOME.sub("~", "\n".join(lines).rstrip() + "\n")
    with whole_file(draft_folder / "README.md") as scratch:
        scratch.write_text(text, encoding="utf-8")


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _relative(folder: Path) -> str:
    """As seen from here; the whole path where it lies elsewhere."""
    path = folder.absolute()
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _license(folder: Path) -> str | None:
    file = folder / "README.md"
    if not file.is_file():
        return None
    front = re.match(r"---\n(.*?\n)---\n", file.read_text(encoding="utf-8"), re.DOTALL)
    found = re.search(r"^license: *(\S.*)$", front[1], re.MULTILINE) if front else None
    return found[1].strip() if found else None


def _is_hub_id(target: str | None) -> bool:
    if target is None or "/" not in target or not HUB_ID.fullmatch(target):
        return False
    return not Path(target).exists()


def _front_matter(draft: DraftCheckpoint, target: str | None, license: str | None) -> list[str]:
    """For the Hugging Face hub; what is not known is left out."""
    lines = ["---", "library_name: vllm"]
    lines += [f"base_model: {target}"] if _is_hub_id(target) else []
    lines += [f"license: {license}"] if license else []
    kind = "eagle" if draft.layout.name == "EAGLE" else "griffin"
    return [*lines, "tags:", "- speculative-decoding", f"- {kind}", "- vllm-griffin", "---", ""]


def _introduction(draft: DraftCheckpoint, target: str | None) -> list[str]:
    config, layout = draft.config, draft.layout
    weights = {key: info for key, info in draft.tensors.items() if key != EMBEDDING}
    parameters = sum(math.prod(info.shape) for info in weights.values())
    dtypes = ", ".join(sorted({info.dtype for info in weights.values()}))
    embedding = "its own" if layout.own_embedding else "the target's, not stored here"
    tree = PAPER_TREE | draft.tree_defaults()
    about = {
        "GRIFFIN": "token-guided fusion and a token-enhanced head",
        "GRIFFIN without TEH": "token-guided fusion, one output",
        "GRIFFIN without TGF": "a linear fusion and a token-enhanced head",
        "EAGLE": "a linear fusion, one output",
    }[layout.name]
    shown = f" for {_title(target)}" if target else ""
    return [
        f"# {layout.name} draft{shown}",
        "",
        "A draft model for speculative decoding with trees in vLLM, by the plugin `vllm-griffin`: "
        f"one decoder layer with {about}. It proposes tokens; what the target answers stays what it is.",
        "",
        *table(
            {
                "target": f"`{target}`" if target else "not recorded",
                "parameters": f"{parameters:,} ({dtypes}), LM head and embedding not counted",
                "embedding": embedding,
                "hidden, intermediate size": f"{config.hidden_size}, {config.intermediate_size}",
                "heads (queries, keys and values, size)": f"{config.num_attention_heads}, "
                f"{config.num_key_value_heads}, {config.head_dim}",
                "vocabulary": f"{config.vocab_size:,}",
                "default tree (nodes, depth, top-k)": ", ".join(str(n) for n in tree.values()),
            }
        ),
    ]


def _title(target: str) -> str:
    return target if _is_hub_id(target) else Path(target).name


def _training(run: Mapping[str, Any]) -> list[str]:
    data, settings = run.get("data") or {}, run.get("settings") or {}
    counts = {"documents to train on": run.get("documents"), "held out": run.get("held_out")}
    counts |= {**data.get("counts", {}), **data.get("settings", {})}
    commands = [record["command"] for record in (data, run) if record.get("command")]
    lines = ["## Training", "", *code_block("\n".join(commands)), "Data:", "", *table(counts)]
    shown = {k: v for k, v in settings.items() if k != "stages"}
    stages = settings.get("stages") or []
    if stages:
        steps = sum(n for _, n in stages)
        parts = ", then ".join(f"{n} of {p} pass{'' if p == 1 else 'es'}" for p, n in stages)
        shown = {"steps": f"{steps}: {parts}"} | shown
    if run.get("preset"):
        shown = {"preset": run["preset"]} | shown
    if run.get("init_from"):
        shown = {"weights to start from": run["init_from"]} | shown
    lines += ["Settings and losses:", "", *table(shown)] if shown else []
    return [*lines, *_circumstances(run)]


def _circumstances(record: Mapping[str, Any]) -> list[str]:
    """Commit, versions and hardware of a record of `provenance.describe`."""
    facts = {k: record.get(k) for k in ("started", "seed", "commit", "versions", "hardware")}
    shown = {k: v for k, v in facts.items() if v is not None}
    return table(shown) if shown else []


def _held_out(row: Row) -> list[str]:
    """Figures of the log's best row, whose weights these are."""
    passes = sum(f"val_agree{n}" in row for n in range(len(row)))
    head = [
        "| | " + " | ".join(f"pass {n}" for n in range(passes)) + " |",
        "|---" * (passes + 1) + "|",
    ]
    body = [
        f"| {label} | " + " | ".join(figure(row.get(f"{key}{n}")) for n in range(passes)) + " |"
        for key, label in HELD_OUT_ROWS
    ]
    lines = [f"## Held-out documents, at step {row['step']:g}", ""]
    lines += [*head, *body, ""] if passes else []
    if "chain" in row and "top3" in row:
        lines += [
            f"Teacher-forced acceptance length: {row['chain']:.2f} for a chain of 6, {row['top3']:.2f} with "
            "the three best tokens at each step. Pass n is the draft's step n + 1.",
            "",
        ]
    return lines


def _conversion(record: Mapping[str, Any]) -> list[str]:
    files = record.get("files") or {}
    return [
        "## Conversion",
        "",
        *code_block(record.get("command")),
        *table(
            {"source": record.get("source"), "layout": record.get("layout")}
            | {f"sha256 of {file}": digest for file, digest in files.items()}
        ),
        *_circumstances(record),
    ]


def _evaluation(file: Path, draft: Path) -> list[str]:
    """The rows of this draft: by its folder, or by the folder's name where it was moved."""
    raw = read_json(file)
    rows = raw.get("rows")
    if not isinstance(rows, list):
        raise ValueError(f"{file}: `rows` must be a list, found {rows!r}")
    for number, row in enumerate(rows):
        missing = [k for k in ROW_KEYS if not isinstance(row, Mapping) or k not in row]
        if missing:
            raise ValueError(
                f"{file}: rows[{number}] has no {', '.join(f'`{k}`' for k in missing)}"
            )
    folder = draft.resolve()
    own = [row for row in rows if Path(row["draft"]).resolve() == folder]
    own = own or [row for row in rows if Path(row["draft"]).name == folder.name]
    if not own:
        names = ", ".join(sorted({row["draft"] for row in rows})) or "none"
        raise ValueError(f"{file}: has no row of the draft {draft} (it has: {names})")
    lines = [
        "## Acceptance length",
        "",
        "1 + accepted tokens / verify steps, pooled over the prompts, with its 95 % interval (bootstrap over "
        "prompts).",
        "",
        "| prompts | T | tree (nodes, depth, top-k) | acceptance length | "
        "accepted at depth 1, 2, ... | verify steps |",
        "|---|---|---|---|---|---|",
        *(_evaluation_row(row) for row in own),
        "",
    ]
    record = raw.get("provenance") or {}
    setting = {k: raw.get(k) for k in ("mode", "max_tokens", "dtype", "batch")}
    return [*lines, *code_block(record.get("command")), *table(setting), *_circumstances(record)]


def _evaluation_row(row: Mapping[str, Any]) -> str:
    low, high = (figure(value, 2) for value in row["acceptance_length_95"])
    depths = " ".join(figure(share, 2) for share in row["per_depth"])
    return (
        f"| {row['prompts']} of {row['prompts_of']} | {row['temperature']:g} | {row['tree']} | "
        f"{figure(row['acceptance_length'], 2)} [{low}, {high}] | {depths} | {row['steps']} |"
    )


def _serving(target: str, name: str, alone: bool) -> list[str]:
    """The commands; `alone`: the folder names its target (speculators layout)."""
    spec = {"method": "griffin", "model": name}
    lines = ["## Use", "", "With `vllm-griffin` installed beside vLLM:", "", "```"]
    lines += [f"vllm serve {shlex.quote(name)}", ""] if alone else []
    lines += [
        f"vllm serve {shlex.quote(target)} --speculative-config {shlex.quote(json.dumps(spec))}",
        "```",
        "",
        "```python",
        *(["import os"] if HOME.match(target) else []),
        "from vllm import LLM",
        "",
    ]
    lines += [f"llm = LLM({json.dumps(name)})  # finds its target", "# or"] if alone else []
    lines += [f"llm = LLM({_python(target)}, speculative_config={json.dumps(spec)})", "```", ""]
    if not _is_hub_id(target):
        lines += ["Paths are as seen from where the draft was made.", ""]
    return lines


def _python(path: str) -> str:
    return f"os.path.expanduser({json.dumps(path)})" if HOME.match(path) else json.dumps(path)
