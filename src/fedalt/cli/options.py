"""The options that name a run's settings, shared by the commands that take them; help texts come from the config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.markup import escape
from typer.core import TyperCommand

from fedalt.cli.show import complain
from fedalt.config import RunConfig, parse_override
from fedalt.errors import UserError
from fedalt.experiment.folder import IfExists, settings_of

_OPTIONS: dict[str, tuple[str, type, tuple[str, ...]]] = {
    "model": ("model.name", str, ("--model", "--model_name")),
    "data": ("data.source", str, ("--data", "--data_path")),
    "method": ("method", str, ("--method",)),
    "rounds": ("federation.rounds", int, ("--rounds",)),
    "local_epochs": ("training.local_epochs", int, ("--local-epochs", "--local_epochs")),
    "clients": ("data.clients", int, ("--clients", "--client_num")),
    "lr": ("training.lr", float, ("--lr",)),
    "rank": ("lora.r", int, ("--rank",)),
    "seed": ("seed", int, ("--seed",)),
    "devices": ("federation.devices", str, ("--devices",)),
    "out": ("out", str, ("--out", "--result_dir")),
}
"""Parameter → config key, type, flags (the second one is the official README's)."""

_CONFIG = Annotated[Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="settings; the defaults when not given")]
_SET = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="any other setting, for example lora.dropout=0; repeatable"),
]
INSIGHT_ROWS = "10"
"""Test rows per client of ``fedalt report RUN --insight``."""
_RESUME = Annotated[bool, typer.Option("--resume", help="continue at the last finished round, or start")]
_OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="replace a run that is there")]


class InsightCommand(TyperCommand):
    """Lets ``--insight`` stand without its number, which Typer cannot say."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write the number out where it is missing."""
        full: list[str] = []
        for here, after in zip(args, [*args[1:], ""], strict=True):
            full += [here, INSIGHT_ROWS] if here == "--insight" and not after.isdigit() else [here]
        return super().parse_args(ctx, full)


def settings(*without: str, starts: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of ``run``, except some; it is called with ``config`` and ``if_exists``.

    Args:
        without: Parameters that the command does not have.
        starts: Whether it starts runs; one that does not has no ``--resume`` and ``--overwrite``, and no ``if_exists``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        names = [name for name in _OPTIONS if name not in without]
        parameters = inspect.signature(command, eval_str=True).parameters
        own = [_parameter(n, p.annotation, p.default) for n, p in parameters.items() if n not in _GIVEN]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            path, sets = values.pop("config_file"), values.pop("sets")
            exists = _if_exists(values.pop("resume", False), values.pop("overwrite", False))
            flags = [(_OPTIONS[name][0], values.pop(name)) for name in names]
            overrides = [(key, value) for key, value in flags if value is not None]
            overrides += [parse_override(text) for text in sets or ()]
            given = {"if_exists": exists} if starts else {}
            try:
                command(config=settings_of(path, overrides, exists), **given, **values)
            except KeyboardInterrupt:
                complain("stopped; finished rounds are safe, --resume goes on from there")
                raise typer.Exit(1) from None

        shared = [_parameter("config_file", _CONFIG), *(_parameter(name, _option(name)) for name in names)]
        if starts:
            shared += [_parameter("resume", _RESUME, False), _parameter("overwrite", _OVERWRITE, False)]
        shared += [_parameter("sets", _SET)]
        wrapper.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (*shared, *own)}
        return wrapper

    return decorate


_GIVEN = ("config", "if_exists")


def _if_exists(resume: bool, overwrite: bool) -> IfExists:
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    return "resume" if resume else "overwrite" if overwrite else "ask"


def _option(name: str) -> Any:
    key, kind, flags = _OPTIONS[name]
    description, default = _describe(key)
    return Annotated[kind | None, typer.Option(*flags, help=escape(f"{description} (default: {default})"))]


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _describe(key: str) -> tuple[str, str]:
    section: type[BaseModel] = RunConfig
    *parents, last = key.split(".")
    for parent in parents:
        section = section.model_fields[parent].annotation  # type: ignore[assignment]
    field = section.model_fields[last]
    return field.description or "", "by rule" if field.default is None else str(field.default)
