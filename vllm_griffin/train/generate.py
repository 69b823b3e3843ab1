"""The target's own answers to prompts, by plain transformers: enough for small test sets."""

import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


def read_prompts(path: str | Path, limit: int | None = None) -> list[tuple[int, str]]:
    """First turns of a JSONL file with `turns` and `question_id` or `id`: (number, text)."""
    prompts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        prompts.append((int(row.get("question_id", row.get("id", number))), row["turns"][0]))
    return prompts[:limit]


@torch.inference_mode()
def greedy_answers(
    # A Hugging Face causal language model and its tokenizer
    model: Any,
    tokenizer: Any,
    prompts: list[tuple[int, str]],
    new_tokens: int,
    batch: int = 40,
) -> list[dict]:
    """Greedy answers of a chat model in the layout that `data.read_responses` reads.

    Prompts go through the tokenizer's chat template as one user turn. Padding is at the left; an answer
    ends after the end-of-sequence token.
    """
    encoded = []
    for number, text in prompts:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        encoded.append((number, list(ids["input_ids"])))
    encoded.sort(key=lambda item: len(item[1]))
    end = tokenizer.eos_token_id
    answers = []
    for first in tqdm(range(0, len(encoded), batch), desc="answers", unit="batch"):
        group = encoded[first : first + batch]
        width = max(len(ids) for _, ids in group)
        padded = torch.tensor([[end] * (width - len(ids)) + ids for _, ids in group])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in group])
        output = model.generate(
            input_ids=padded,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=end,
        )
        for (number, ids), row in zip(group, output[:, width:].tolist(), strict=True):
            answer = row[: row.index(end) + 1] if end in row else row
            answers.append({"id": number, "prompt_token_ids": ids, "response_token_ids": answer})
    return sorted(answers, key=lambda answer: answer["id"])
