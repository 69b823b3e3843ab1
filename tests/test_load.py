"""A small cut of `benchmarks/load.py`: load, clients that leave, and a death in mid-stream."""

import asyncio
import dataclasses
import json
import math
from collections.abc import Iterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.engine.harness import PAIRS
from tests.load.client import Answer, Choice, visit_all
from tests.load.faults import ENGINE_CORE, clean, kill, streams
from tests.load.reference import Expected, Verdict, expected, judge
from tests.load.rounds import LIMITS, SPEC, flat, growth, load_round
from tests.load.server import Server, serve
from tests.load.traffic import DrawPrompt, Visit, source_code, visits

TARGET, DRAFT = PAIRS["tiny"]


@pytest.fixture(scope="module")
def prompt() -> DrawPrompt:
    return source_code(TARGET)


@pytest.fixture(scope="module")
def clients(prompt: DrawPrompt) -> list[Visit]:
    """All at once: how many are preempted, and who leaves, must not hang on the machine's speed."""
    found = visits(prompt, 60, seed=6, leaving=0.3)
    return [dataclasses.replace(visit, pause=0.0) for visit in found]


@pytest.fixture(scope="module")
def wanted(clients: list[Visit]) -> dict[str, Expected]:
    return expected("tiny", clients, max_num_seqs=32)


@pytest.fixture(scope="module")
def server(wanted: dict, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """After the plain engine has ended."""
    log = tmp_path_factory.mktemp("load") / "server.log"
    with serve(TARGET, {"model": str(DRAFT), **SPEC}, flat(LIMITS), log, None) as running:
        yield running


def test_nothing_is_wrong_lost_or_hung(
    server: Server, clients: list[Visit], wanted: dict[str, Expected]
) -> None:
    verdict, record = load_round(server, clients, wanted)
    assert verdict.clean, verdict.notes
    assert verdict.complete + verdict.left == len(clients)
    at_once = sum(visit.stream and visit.leaves == 0 for visit in clients)
    assert verdict.left >= at_once > 2, "clients that stay prove nothing about those that leave"
    assert record["preempted"] > 0, "the cache is too large for this test"
    assert record["acceptance_length"] > 1.3
    assert not any(record["left_over"].values()), record["left_over"]


def test_an_engine_killed_in_mid_stream(server: Server, prompt: DrawPrompt) -> None:
    """The last test of this server."""
    record = kill(server, streams(prompt, 6, length=100), ENGINE_CORE)
    assert clean(record), record


def _judged(answer: Answer, gap: float = math.inf) -> Verdict:
    visit = Visit("v", {"stream": True}, 0.0)
    plain = Expected([Choice([7, 8, 9], "abc", "length", [-1.0, -2.0, -3.0])], [[1.0, gap, 1.0]])
    return judge([visit], {"v": answer}, {"v": plain})


def _choice(**other: object) -> dict[int, Choice]:
    same = {"tokens": [7, 8, 9], "text": "abc", "finish_reason": "length"}
    return {0: Choice(**same | {"logprobs": [-1.0, -2.0, -3.0]} | other)}


@pytest.mark.parametrize(
    "other",
    [
        {"tokens": [7, 5, 9]},
        {"tokens": [7, 8]},
        {"tokens": [7, 8, 9, 1]},
        {"text": "abd"},
        {"finish_reason": None},
        {"finish_reason": "stop"},
        {"logprobs": [-1.0, -2.1, -3.0]},
        {"logprobs": []},
    ],
)
def test_a_wrong_answer_is_seen(other: dict) -> None:
    assert _judged(Answer("complete", _choice())).clean
    assert _judged(Answer("complete", _choice(**other))).wrong == 1
    assert _judged(Answer("complete", {})).wrong == 1


def test_only_a_shown_near_tie_is_excused() -> None:
    other = Answer("complete", _choice(tokens=[7, 5, 9]))
    assert (_judged(other, 2e-5).near_ties, _judged(other, 2e-5).wrong) == (1, 0)
    assert _judged(other, 2e-3).wrong == 1
    assert _judged(Answer("complete", _choice(tokens=[5, 8, 9])), 2e-5).wrong == 1


def test_who_leaves_has_seen_how_the_answer_begins() -> None:
    begun = {"tokens": [7, 8], "text": "a", "finish_reason": None, "logprobs": [-1.0, -2.0]}
    assert _judged(Answer("left", _choice(**begun))).left == 1
    assert _judged(Answer("left", _choice(**begun))).clean
    assert _judged(Answer("left", _choice(**begun | {"tokens": [7, 9]}))).wrong == 1
    assert _judged(Answer("left", _choice(**begun | {"text": "b"}))).wrong == 1


@pytest.mark.parametrize("end", ["lost", "hung"])
def test_an_answer_that_does_not_come_is_seen(end: str) -> None:
    verdict = _judged(Answer(end, _choice()))
    assert getattr(verdict, end) == 1 and not verdict.clean


PART = {"index": 0, "text": "a", "token_ids": [7], "finish_reason": None, "logprobs": None}


async def _bad_server(request: web.Request) -> web.StreamResponse:
    """Fails in the way that the prompt names."""
    how = (await request.json())["prompt"]
    if how == "refuses":
        return web.Response(status=500, text="no")
    answer = web.StreamResponse()
    await answer.prepare(request)
    await answer.write(f"data: {json.dumps({'choices': [PART]})}\n\n".encode())
    if how == "hangs":
        await asyncio.sleep(5)
    if how == "drops":
        request.transport.close()
    if how == "dies":
        await answer.write(b'data: {"error": {"message": "dead"}}\n\n')
    return answer


async def _ask_bad_server(how: str) -> Answer:
    app = web.Application()
    app.router.add_post("/v1/completions", _bad_server)
    async with TestServer(app) as server:
        visit = Visit("v", {"prompt": how, "stream": True}, 0.0)
        return (await visit_all(str(server.make_url("")).rstrip("/"), [visit], 1.0))["v"]


@pytest.mark.parametrize(
    ("how", "end", "error"),
    [
        ("refuses", "lost", "500: no"),
        ("drops", "lost", "Client"),
        ("dies", "lost", "dead"),
        ("stops", "lost", ""),
        ("hangs", "hung", ""),
    ],
)
def test_a_client_knows_what_became_of_its_answer(how: str, end: str, error: str) -> None:
    answer = asyncio.run(_ask_bad_server(how))
    assert answer.end == end and error in answer.error
    assert how == "refuses" or answer.choices[0].tokens == [7]


def test_growth_is_that_of_most_rounds() -> None:
    filling = [0, 50, 90, 100, 110]
    assert growth([*filling, 115, 115, 115, 130, 130]) == 0
    assert growth([*filling, 117, 124, 131, 138, 145]) == 7
