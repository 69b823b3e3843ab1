"""Prompt files, stored outputs, tree names: what is read, and what is refused by name."""

import json

import pytest

from vllm_griffin.data.chat import fixed_clock
from vllm_griffin.evaluate.outputs import Output, append_outputs, read_outputs
from vllm_griffin.evaluate.prompts import encode, load_prompts, read_first_turns
from vllm_griffin.tree_shape import TreeShape

OUTPUT = Output(3, 1.0, [1, 2], [4, 5], [6], set="s", seed=3, max_tokens=2, target="digest")


class Tokenizer:
    """Characters as ids; a chat template wraps them."""

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def __call__(self, text):
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, turns, add_generation_prompt, return_dict, strftime_now):
        assert add_generation_prompt and return_dict and strftime_now is fixed_clock
        return {"input_ids": [0, *(ord(c) for c in turns[0]["content"]), 1]}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_first_turns(tmp_path):
    file = write(
        tmp_path / "p.jsonl",
        {"question_id": 81, "turns": ["a", "b"]},
        "",
        {"id": 7, "prompt": "c"},
        {"turns": ["d"]},
    )
    assert read_first_turns(file) == [(81, "a"), (7, "c"), (3, "d")]
    assert read_first_turns(file, 2) == [(81, "a"), (7, "c")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: Expecting"),
        ("[1]", "line 2: not a JSON object"),
        ({"turns": []}, 'line 2: no "turns"'),
        ({"turns": [3]}, 'line 2: no "turns"'),
        ({"turns": ["x"], "question_id": None}, "line 2: int"),
        ({"turns": ["\ud83d"]}, "line 2: 'utf-8' codec can't encode"),
        ({"turns": ["x"], "question_id": 1}, "line 2: question 1 is there twice"),
    ],
)
def test_a_malformed_prompt_is_named(tmp_path, row, message):
    file = write(tmp_path / "p.jsonl", {"question_id": 1, "turns": ["a"]}, row)
    with pytest.raises(ValueError, match=r"p\.jsonl") as caught:
        read_first_turns(file)
    assert message in str(caught.value)


def test_names_for_ids_and_a_byte_order_mark(tmp_path):
    file = write(tmp_path / "p.jsonl", "\ufeff" + json.dumps({"id": "ultra-1", "prompt": "a"}))
    assert read_first_turns(file) == [(0, "a")]


def test_no_prompts(tmp_path):
    with pytest.raises(ValueError, match="has no prompts"):
        read_first_turns(write(tmp_path / "p.jsonl"))


def test_prompts_go_through_the_chat_template_if_there_is_one(tmp_path):
    assert encode("ab", Tokenizer()) == [97, 98]
    assert encode("ab", Tokenizer("{}")) == [0, 97, 98, 1]
    file = write(tmp_path / "p.jsonl", {"turns": ["a"]})
    (prompt,) = load_prompts([file], Tokenizer())
    assert (prompt.set, prompt.id, prompt.tokens) == ("p", 0, [97])
    with pytest.raises(ValueError, match="different names"):
        load_prompts([file, file], Tokenizer())


def test_outputs_are_read_as_written(tmp_path):
    file = tmp_path / "folder" / "outputs.jsonl"
    append_outputs(file, [OUTPUT])
    append_outputs(file, [OUTPUT])
    assert read_outputs(file) == [OUTPUT, OUTPUT]
    assert read_outputs(tmp_path / "none.jsonl") == []
    assert OUTPUT.key == ("s", 3, 1.0)
    assert (OUTPUT.end, OUTPUT.text) == (4, [1, 2, 4, 5])


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    file = tmp_path / "outputs.jsonl"
    append_outputs(file, [OUTPUT])
    with open(file, "a") as lines:
        lines.write('{"id": 4, "temp')
    assert read_outputs(file) == [OUTPUT]
    append_outputs(file, [OUTPUT])
    assert read_outputs(file) == [OUTPUT, OUTPUT]


def test_outputs_of_others(tmp_path):
    row = {"id": 0, "temperature": 0.0, "prompt_token_ids": [1], "response_token_ids": [2]}
    file = write(tmp_path / "o.jsonl", row | {"note": "more"})
    (output,) = read_outputs(file)
    assert (output.seed, output.tail_token_ids, output.set) == (None, [], "")
    for bad in ("{", {**row, "response_token_ids": []}, {"id": 1}, 3):
        write(file, row, bad)
        with pytest.raises(ValueError, match=r"o\.jsonl, line 2"):
            read_outputs(file)


@pytest.mark.parametrize(
    ("text", "shape", "levels"),
    [("59,6,10", (59, 6, 10), 6), ("chain:4", (4, 4, 1), 4), ("2,6,1", (2, 6, 1), 2)],
)
def test_tree_names(text, shape, levels):
    tree = TreeShape.parse(text)
    assert (tree.nodes, tree.depth, tree.top_k) == shape
    assert tree.levels == levels
    assert TreeShape.parse(str(tree)) == tree
    assert tree.speculative_config("d")["num_speculative_tokens"] == shape[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("59,6", "neither"),
        ("tree", "neither"),
        ("chain:x", "neither"),
        ("chain:0", "at least 1"),
        ("4,0,2", "at least 1"),
        ("7,2,2", "at most 6 nodes"),
        ("7,6,1", "at most 6 nodes"),
    ],
)
def test_trees_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=message):
        TreeShape.parse(text)
