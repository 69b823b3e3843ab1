"""Clients of a server: each sends one request and stays, or leaves early."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from tests.load.traffic import Visit

End = Literal["complete", "left", "lost", "hung"]
# No answer in this time is none; a request that waits for its turn on a slow machine has plenty.
HUNG_S = 1200.0
IN_FLIGHT = 64


@dataclass
class Choice:
    """One completion, as far as it came."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    # log-probability of each token, where the request asks for them
    logprobs: list[float] = field(default_factory=list)

    def add(self, part: dict[str, Any]) -> None:
        """Takes in a choice of an answer, or of a chunk."""
        self.tokens += part["token_ids"] or []
        self.text += part["text"]
        self.finish_reason = part["finish_reason"] or self.finish_reason
        self.logprobs += (part["logprobs"] or {}).get("token_logprobs", [])


@dataclass
class Answer:
    """What one client has seen so far; lost until it is known to be something better."""

    end: End = "lost"
    choices: dict[int, Choice] = field(default_factory=dict)
    error: str = ""


async def visit_all(
    url: str,
    visits: Sequence[Visit],
    patience: float = HUNG_S,
    answers: dict[str, Answer] | None = None,
) -> dict[str, Answer]:
    """Clients come as their pauses say, at most IN_FLIGHT at a time.

    Args:
        patience: seconds after which a client has hung.
        answers: name -> answer, for a caller that looks at them while they come.

    Returns:
        All answers, by name.
    """
    answers = {} if answers is None else answers
    places = asyncio.Semaphore(IN_FLIGHT)

    async def visit(one: Visit) -> None:
        try:
            await ask(session, url, one, answers.setdefault(one.name, Answer()), patience)
        finally:
            places.release()

    timeout = aiohttp.ClientTimeout(total=None)
    # Each client has a connection of its own; one that idles is closed by the server after a while.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with (
        aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
        asyncio.TaskGroup() as clients,
    ):
        for one in visits:
            await asyncio.sleep(one.pause)
            await places.acquire()
            clients.create_task(visit(one))
    return answers


async def ask(
    session: aiohttp.ClientSession, url: str, visit: Visit, answer: Answer, patience: float
) -> None:
    """One client, from its request to its answer, its leaving, or what went wrong."""
    try:
        async with asyncio.timeout(patience):
            await _ask(session, f"{url}/v1/completions", visit, answer)
    except TimeoutError:
        answer.end = "hung"
    except (aiohttp.ClientError, json.JSONDecodeError) as error:
        answer.error = repr(error)


async def _ask(session: aiohttp.ClientSession, url: str, visit: Visit, answer: Answer) -> None:
    waits = None if visit.stream else visit.leaves
    try:
        async with asyncio.timeout(waits), session.post(url, json=visit.body) as response:
            if response.status != 200:
                answer.error = f"{response.status}: {await response.text()}"
                return
            chunks = 0
            async for part in _parts(response, visit.stream):
                if part is None:
                    answer.end = "complete"
                    return
                if visit.stream and chunks == visit.leaves:
                    # Closing without reading the rest drops the connection.
                    response.close()
                    answer.end = "left"
                    return
                chunks += 1
                if "error" in part:
                    answer.error = json.dumps(part["error"])
                    return
                for choice in part["choices"]:
                    answer.choices.setdefault(choice["index"], Choice()).add(choice)
    except TimeoutError:
        if waits is None:
            raise
        answer.end = "left"


async def _parts(
    response: aiohttp.ClientResponse, stream: bool
) -> AsyncIterator[dict[str, Any] | None]:
    """The answer in one piece or in chunks; None where the server says that it is whole."""
    if not stream:
        yield await response.json()
        yield None
        return
    async for line in response.content:
        data = line.decode().removeprefix("data: ").strip()
        if data:
            yield None if data == "[DONE]" else json.loads(data)
