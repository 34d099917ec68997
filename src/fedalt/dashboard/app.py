"""The dashboard's addresses: pages, and what they ask for as JSON."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fedalt.dashboard import form, views
from fedalt.dashboard.guard import REPORT, Guard
from fedalt.dashboard.processes import Processes
from fedalt.dashboard.talk import Talk
from fedalt.errors import UserError
from fedalt.report.page import SCRIPT, STYLE
from fedalt.runs.client_folder import client_ids
from fedalt.runs.events import Event
from fedalt.runs.folder import RunFolder
from fedalt.runs.watch import Log, Watch

_PAGE = Path(__file__).with_name("page")
_LOGS = 4
"""Runs whose events are held in memory."""
_KEPT = {"Cache-Control": "private, max-age=86400"}


class Dashboard:
    """A folder of runs; every method below answers an address."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.watch, self.processes, self.talk = Watch(self.root), Processes(self.root), Talk()
        self._log, self._reading = lru_cache(_LOGS)(Log), threading.Lock()
        self._estimate: asyncio.subprocess.Process | None = None

    def inside(self, name: str) -> Path:
        """A folder below the runs', by its path there; nothing else is ever looked at."""
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root):
            raise UserError(f"{name}: no such folder among the runs")
        return path

    def _read(self, folder: RunFolder) -> tuple[Log, list[Event]]:
        with self._reading:
            log = self._log(folder.events)
            return log, log.read()

    def runs(self) -> dict[str, Path]:
        """Path below the folder → a run's folder."""
        return {path.relative_to(self.root).as_posix(): path for path in self.watch.folders()[0]}

    def listed(self, query: Mapping[str, str]) -> Any:
        """All runs, comparisons, and what was started here and has no run yet."""
        summaries, started = self.watch.summaries(), {one["path"]: one for one in self.processes.known()}
        rows = [asdict(one) for one in summaries]
        for row in rows:
            own = started.pop(row["path"], None)
            row["error"] = row["error"] if own is None or own["alive"] or not own["error"] else own["error"]
            row["state"] = "running" if own and own["alive"] and row["state"] == "stopped" else row["state"]
        compared = [path.relative_to(self.root).as_posix() for path in self.watch.folders()[1]]
        others = [one for one in started.values() if one["alive"] or one["error"]]
        return {"root": str(self.root), "runs": rows, "comparisons": compared, "started": others}

    def run(self, query: Mapping[str, str]) -> Any:
        """A run's line, and, where its log is another one than the page has, everything about it."""
        folder = RunFolder(self.inside(query["path"]))
        log, events = self._read(folder)
        summary, own = self.watch.summary(folder.path), self.processes.started(folder.path)
        known = {
            "version": log.version,
            "summary": summary and asdict(summary),
            "started": own,
            "report": folder.report.is_file(),
            "talks": folder.final_scores.is_file() and bool(client_ids(folder)),
        }
        return known if query.get("have") == log.version else known | views.run_view(folder, events)

    def comparison(self, query: Mapping[str, str]) -> Any:
        """What a comparison found."""
        return views.comparison_view(self.inside(query["path"]))

    def side_by_side(self, query: Mapping[str, str]) -> Any:
        """Several runs."""
        folders = {name: RunFolder(self.inside(name)) for name in json.loads(query["paths"])}
        return views.runs_compared(folders, {name: self._read(folder)[1] for name, folder in folders.items()})

    def fields(self, query: Mapping[str, str]) -> Any:
        """The form of a new run, and what can fill it."""
        return {"sections": form.fields(), "starts": {"recipe": sorted(form.recipes()), "run": list(self.runs())}}

    def filled(self, query: Mapping[str, str]) -> Any:
        """Settings of a recipe or run."""
        return form.given_in(query["kind"], query["name"], self.runs())

    def start(self, asked: Mapping[str, Any]) -> Any:
        """Start a run or a comparison."""
        several = {key: str(asked.get(key) or "") for key in ("methods", "seeds")}
        return {"path": self.processes.start(str(asked["name"]), form.read(asked["values"]), **several)}

    def stop(self, asked: Mapping[str, Any]) -> Any:
        """Stop a run."""
        self.processes.stop(self.inside(asked["path"]))
        return {}

    def resume(self, asked: Mapping[str, Any]) -> Any:
        """Go on with a run."""
        self.processes.resume(self.inside(asked["path"]))
        return {}

    def forget(self, asked: Mapping[str, Any]) -> Any:
        """Drop a start that came to nothing."""
        self.processes.forget(self.inside(asked["path"]))
        return {}

    async def estimate(self, request: Request) -> Response:
        """What a run will cost, found out in a process of its own; a new question ends the last one."""
        asked = await request.json()
        command = await run_in_threadpool(lambda: self.processes.estimating(form.read(asked["values"])))
        if self._estimate and self._estimate.returncode is None:
            self._estimate.terminate()
        pipe = asyncio.subprocess.PIPE
        process = self._estimate = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        out, err = await process.communicate()
        if process.returncode:
            lines = err.decode(errors="replace").splitlines() or ["ended by another question"]
            told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise UserError("\n".join(told) or lines[-1])
        return Response(out, media_type="application/json")

    async def chat(self, request: Request) -> Response:
        """Answers of clients, as they are written."""
        asked = await request.json()
        return StreamingResponse(self.talk.stream(self.inside(asked["path"]), asked), media_type="application/x-ndjson")

    async def report(self, request: Request) -> Response:
        """A report, kept apart from these pages."""
        file = self.inside(request.path_params["path"]) / "report.html"
        if not file.is_file() or file.is_symlink():
            raise UserError("there is no report")
        return FileResponse(file, headers={"Content-Security-Policy": REPORT})


def _page(name: str, media: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        text = (_PAGE / name).read_text(encoding="utf-8")
        if name == "style.css":
            text = STYLE + text
        return Response(f"{text}{SCRIPT}" if name == "app.js" else text, media_type=media)

    return answer


async def _plotly(request: Request) -> Response:
    return Response(get_plotlyjs(), media_type="text/javascript", headers=_KEPT)


async def _refused(request: Request, error: Exception) -> Response:
    told = str(error) if isinstance(error, UserError) else f"not understood ({type(error).__name__}: {error})"
    return JSONResponse({"error": told}, 422)


def application(root: Path, token: str) -> Guard:
    """The dashboard of a folder, guarded."""
    board = Dashboard(root)

    def get(method: Callable[[Mapping[str, str]], Any]) -> Route:
        async def answer(request: Request) -> Response:
            return JSONResponse(await run_in_threadpool(method, request.query_params))

        return Route(f"/api/{method.__name__}", answer)

    def post(method: Callable[[Mapping[str, Any]], Any]) -> Route:
        async def answer(request: Request) -> Response:
            return JSONResponse(await run_in_threadpool(method, await request.json()))

        return Route(f"/api/{method.__name__}", answer, methods=["POST"])

    routes = [Route("/", _page("index.html", "text/html")), Route("/style.css", _page("style.css", "text/css"))]
    routes += [Route("/app.js", _page("app.js", "text/javascript")), Route("/plotly.js", _plotly)]
    routes += map(get, (board.listed, board.run, board.comparison, board.side_by_side, board.fields, board.filled))
    routes += map(post, (board.start, board.stop, board.resume, board.forget))
    routes += [Route(f"/api/{one.__name__}", one, methods=["POST"]) for one in (board.estimate, board.chat)]
    routes += [Route("/report/{path:path}", board.report)]
    mistakes: dict[Any, Any] = dict.fromkeys((UserError, KeyError, ValueError, TypeError), _refused)
    return Guard(Starlette(routes=routes, exception_handlers=mistakes), token)
