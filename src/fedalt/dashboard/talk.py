"""Finished runs' clients, asked from a page: one at a time, each answer piece by piece."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedalt.errors import UserError
from fedalt.evaluation.generate import Sampling
from fedalt.personal.chat import Chat, Manner
from fedalt.runs.client_folder import client_ids
from fedalt.runs.folder import finished_run
from fedalt.runs.setup import Bases

Tell = Callable[[dict[str, Any]], None]


class GoneError(Exception):
    """Nobody reads on."""


class Talk:
    """The base in memory; whoever asks waits for those who asked before."""

    def __init__(self) -> None:
        self._bases, self._busy = Bases(), threading.Lock()

    async def stream(self, run: Path, asked: Mapping[str, Any]) -> AsyncIterator[bytes]:
        """A line of JSON for every piece of an answer, and one at its end."""
        loop, lines, gone = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None](), threading.Event()

        def tell(line: dict[str, Any] | None) -> None:
            if gone.is_set():
                raise GoneError
            loop.call_soon_threadsafe(lines.put_nowait, line)

        def work() -> None:
            try:
                with self._busy:
                    for answer in self._answers(run, asked, tell):
                        tell(answer)
            except UserError as error:
                tell({"error": str(error)})
            except GoneError:
                return
            finally:
                if not gone.is_set():
                    tell(None)

        future = loop.run_in_executor(None, work)
        try:
            while (line := await lines.get()) is not None:
                yield json.dumps(line).encode() + b"\n"
            await future
        finally:
            gone.set()

    def _answers(self, run: Path, asked: Mapping[str, Any], tell: Tell) -> Iterator[dict[str, Any]]:
        folder, config = finished_run(run)
        temperature, longest = float(asked.get("temperature") or 0), int(asked.get("longest") or 0)
        manner = Manner(Sampling(temperature) if temperature else None, longest or None)
        clients = list(map(int, asked["clients"]))
        for who in [*clients, *([None] if asked.get("base") else [])]:

            def piece(text: str, who: int | None = who) -> None:
                tell({"who": who, "piece": text})

            client = who if who is not None else next(iter(clients or client_ids(folder)))
            chat = Chat(run, client, self._bases.of(config), manner=manner)
            answer = (chat if who is not None else chat.base_alone()).ask(str(asked["prompt"]), piece)
            alpha = [[text, round(weight, 3)] for text, weight in answer.alpha] if who is not None else []
            chances = list(answer.chances.items())[:5]
            yield {"who": who, "text": answer.text, "chances": chances, "alpha": alpha, "slots": answer.slots}
