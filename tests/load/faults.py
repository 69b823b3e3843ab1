"""A process of the server's is killed in mid-stream: what its clients see, and what is left."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.load.client import Answer, visit_all
from tests.load.server import END_S, Server
from tests.load.traffic import DrawPrompt, Visit

# What vLLM's server tells a client whose engine has died.
ENGINE_DEAD = "EngineCore encountered an issue"
# To find all clients in mid-stream.
ATTEMPTS = 20
ENGINE_CORE, WORKER = "VLLM::EngineCore", "VLLM::Worker"


def streams(prompt: DrawPrompt, count: int, length: int) -> list[Visit]:
    """Clients that read for long; few enough that all of them are served at a time."""
    draw = random.Random(0)
    body = {"model": "target", "max_tokens": length, "ignore_eos": True, "return_token_ids": True}
    body |= {"stream": True, "seed": 0}
    return [
        Visit(f"s{i}", body | {"prompt": prompt(draw), "temperature": i % 2}, pause=0.0)
        for i in range(count)
    ]


def kill(server: Server, visits: Sequence[Visit], victim: str) -> dict[str, Any]:
    """Kills the process of this name once each client has had tokens.

    Returns:
        A record: how the clients ended and what they were told, seconds until the last one and until
        the server had ended, its exit code, and processes of its that are still there.
    """
    answers, killed = asyncio.run(_kill(server, visits, victim))
    clients_s = time.monotonic() - killed
    code = server.wait()
    server_s = time.monotonic() - killed
    return {
        "killed": victim,
        "clients": dict(Counter(answer.end for answer in answers.values())),
        "told": dict(Counter(_told(answer) for answer in answers.values())),
        "clients_seconds": round(clients_s, 1),
        "server_seconds": round(server_s, 1),
        "exit_code": code,
        "processes_left": server.left(),
    }


def clean(record: dict[str, Any]) -> bool:
    """Every client was told vLLM's own error, the server has ended, and nothing hangs or is left."""
    return (
        set(record["clients"]) == {"lost"}
        and set(record["told"]) == {ENGINE_DEAD}
        and record["exit_code"] is not None
        and not record["processes_left"]
    )


async def _kill(
    server: Server, visits: Sequence[Visit], victim: str
) -> tuple[dict[str, Answer], float]:
    process = next(p for p in server.children() if p.name().startswith(victim))
    for _ in range(ATTEMPTS):
        answers = {visit.name: Answer() for visit in visits}
        clients = asyncio.create_task(visit_all(server.url, visits, END_S, answers))
        while not clients.done() and not all(answer.choices for answer in answers.values()):
            await asyncio.sleep(0.01)
        if all(answer.end == "lost" for answer in answers.values()):
            break
        # On a busy machine this process may wake up when answers are whole already.
        await clients
    process.kill()
    killed = time.monotonic()
    return await clients, killed


def _told(answer: Answer) -> str:
    """An error without what differs from client to client."""
    if answer.end == "complete":
        return "a whole answer"
    return ENGINE_DEAD if ENGINE_DEAD in answer.error else answer.error or "nothing"
