"""Responses and prompts by the target: what is asked of the engine, and going on after a kill."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind

from tests.training.data_target import tokenizer
from vllm_griffin.data import respond
from vllm_griffin.data.chat import ChatTemplate
from vllm_griffin.data.respond import Request, Sampling, draw_prompts, read_lines
from vllm_griffin.whole_file import append_lines

SAMPLING = Sampling((0.0, 0.7, 1.0), 5, seed=100)
TEXTS = ["hi", "", "hi", " a ", "b", None, "c", "d"]  # by attempt; None does not end


class FakeEngine:
    """Answers with the seed, or with the text of the attempt; stops working after `calls` calls.

    Of the requests that it has been given one by one, it answers the latest two in each step.
    """

    vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=2))

    def __init__(self, calls: int = 1000) -> None:
        self.calls, self.params = calls, []
        self.running: list[tuple[str, Any]] = []
        self.most_running = 0

    def __call__(self) -> "FakeEngine":
        return self

    @property
    def llm_engine(self) -> "FakeEngine":
        return self

    def _call(self) -> None:
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1

    def generate(self, prompts: list[dict], params: list[Any], use_tqdm: bool) -> list[Any]:
        self._call()
        self.params += params
        return [SimpleNamespace(outputs=[self._answer(p)]) for p in params]

    def add_request(self, request_id: str, prompt: dict, params: Any) -> None:
        assert params.output_kind == RequestOutputKind.FINAL_ONLY
        self.params.append(params)
        self.running.append((request_id, params))
        self.most_running = max(self.most_running, len(self.running))

    def step(self) -> list[Any]:
        self._call()
        done = [self.running.pop() for _ in self.running[:2]]
        return [SimpleNamespace(request_id=r, outputs=[self._answer(p)]) for r, p in done]

    def _answer(self, params: Any) -> Any:
        text = TEXTS[(params.seed - SAMPLING.seed) % len(TEXTS)]
        return SimpleNamespace(
            token_ids=[params.seed],
            text=text or "",
            finish_reason="length" if text is None else "stop",
        )


def requests(count: int) -> list[Request]:
    return [Request(i, i, [1, i]) for i in range(count)]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(respond, "batch_size", lambda: 3)


def test_seeds_and_temperatures_go_by_number(tmp_path: Path) -> None:
    engine, path = FakeEngine(), tmp_path / "responses.jsonl"
    found = respond.respond(engine, requests(5), SAMPLING, path)
    assert [p.seed for p in engine.params] == [100, 101, 102, 103, 104]
    assert [p.temperature for p in engine.params] == [0.0, 0.7, 1.0, 0.0, 0.7]
    assert {p.max_tokens for p in engine.params} == {5}
    assert found[(1, 4)] == [104]
    assert engine.most_running == 4, "as many as the engine takes wait for those to end"
    rows = sorted(read_lines(path), key=lambda row: row["id"])
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[1] == {
        "id": 1,
        "temperature": 0.7,
        "prompt_token_ids": [1, 1],
        "response_token_ids": [101],
    }


def test_responses_go_on_where_a_kill_ended_them(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    expected = respond.respond(FakeEngine(), requests(8), SAMPLING, whole)
    with pytest.raises(KeyboardInterrupt):
        respond.respond(FakeEngine(calls=2), requests(8), SAMPLING, path)
    with open(path, "a") as file:
        file.write('{"id": 6, "prompt_to')  # half a line
    rest = FakeEngine()
    assert respond.respond(rest, requests(8), SAMPLING, path) == expected
    assert len(rest.params) == 4
    assert sorted(path.read_text().splitlines()) == sorted(whole.read_text().splitlines())


def test_where_nothing_is_missing_no_engine_starts(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    expected = respond.respond(FakeEngine(), requests(3), SAMPLING, path)
    assert respond.respond(pytest.fail, requests(3), SAMPLING, path) == expected


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    append_lines(path, [{"a": 1}])
    real = open

    class Full:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = real(*args, **kwargs)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            return int(self.file.write(data[:3]))

    monkeypatch.setattr("builtins.open", Full)
    with pytest.raises(OSError, match="No space left"):
        append_lines(path, [{"b": 2}])
    monkeypatch.undo()
    assert path.read_text() == '{"a":1}\n'


def test_drawn_prompts_are_different_ended_and_not_empty(tmp_path: Path) -> None:
    engine, path = FakeEngine(), tmp_path / "prompts.jsonl"
    template = ChatTemplate(tokenizer())
    assert draw_prompts(engine, template, 5, SAMPLING, path) == ["hi", "a", "b", "c", "d"]
    assert {p.temperature for p in engine.params} == {1.0}
    assert all(p.stop == ["<|end|>"] and not p.skip_special_tokens for p in engine.params)


def test_draws_go_on_after_a_kill(tmp_path: Path) -> None:
    template, path = ChatTemplate(tokenizer()), tmp_path / "prompts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        draw_prompts(FakeEngine(calls=2), template, 5, SAMPLING, path)
    stored = read_lines(path)
    assert 0 < len(stored) < 5
    rest = FakeEngine()
    found = draw_prompts(rest, template, 5, SAMPLING, path)
    assert rest.params[0].seed == SAMPLING.seed + stored[-1]["attempt"] + 1
    assert found == ["hi", "a", "b", "c", "d"]


def test_a_target_that_draws_too_little_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = draw_prompts(
        FakeEngine(), ChatTemplate(tokenizer()), 6, SAMPLING, tmp_path / "prompts.jsonl"
    )
    assert len(found) == 5
    assert "5 different prompts of 6 in 60 attempts" in capsys.readouterr().err
