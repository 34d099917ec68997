"""How options are read: old spellings, values left out, errors in one line; those that name a run's settings."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import click
import typer
from click.core import ParameterSource
from click.exceptions import NoArgsIsHelpError
from rich.markup import escape
from typer.core import TyperCommand
from typer.models import ArgumentInfo

from fedalt.cli import complete
from fedalt.cli.recipes import config_path
from fedalt.cli.show import option, switch
from fedalt.config import RunConfig, parse_override
from fedalt.config.hints import fields_at, in_words
from fedalt.errors import UserError, alternatives, did_you_mean, shortened
from fedalt.registry import METHODS, absolute
from fedalt.runs.folder import IfExists, settings_of

_OPTIONS: dict[str, tuple[str, str, str, Any]] = {
    "model": ("model.name", "--model", "NAME", None),
    "data": ("data.source", "--data", "DATA", None),
    "method": ("method", "--method", "NAME", complete.methods),
    "rounds": ("federation.rounds", "--rounds", "N", None),
    "epochs": ("training.local_epochs", "--epochs", "N", None),
    "batch_size": ("training.batch_size", "--batch-size", "N", None),
    "clients": ("data.clients", "--clients", "N", None),
    "lr": ("training.lr", "--lr", "X", None),
    "rank": ("lora.r", "--rank", "N", None),
    "targets": ("lora.targets", "--targets", "NAMES", None),
    "dtype": ("model.dtype", "--dtype", "DTYPE", complete.choices("model.dtype")),
    "seed": ("seed", "--seed", "N", None),
    "devices": ("federation.devices", "--devices", "NAMES", None),
    "out": ("out", "--out", "DIR", None),
}
"""Parameter → dotted key, flag, what stands for its value, what a shell offers. The configuration reads the values."""

_CONFIG = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CONFIG]",
        help="YAML file, or name of a recipe; the defaults when not given",
        autocompletion=complete.configs,
    ),
]


def any_setting(example: str) -> Any:
    """The option ``--set``."""
    return typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=f"any other setting, for example {example}; repeatable",
        autocompletion=complete.settings,
    )


_SET = Annotated[list[str] | None, any_setting("lora.dropout=0")]
_RESUME = Annotated[bool, switch("continue at the last finished round, or start", "--resume")]
_OVERWRITE = Annotated[bool, switch("replace a run that is there", "--overwrite")]


def settings(*without: str, starts: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of ``run``, except some; it is called with ``config`` and ``if_exists``.

    One that starts no runs has no ``--resume`` and ``--overwrite``, and no ``if_exists``.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        names = [name for name in _OPTIONS if name not in without]
        parameters = inspect.signature(command, eval_str=True).parameters
        own = [_parameter(n, p.annotation, p.default) for n, p in parameters.items() if n not in _GIVEN]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            path, sets = values.pop("config_file"), values.pop("sets")
            if starts and "method" in names and path and (path / "config.yaml").is_file():
                if not values["resume"]:
                    raise UserError(
                        f"{path} is the folder of a run; --resume goes on with it; its settings are {path}/config.yaml"
                    )
                path, values["out"] = path / "config.yaml", values["out"] or str(path)
            exists = _if_exists(values.pop("resume", False), values.pop("overwrite", False))
            flags = {_OPTIONS[name][0]: (spelt(_OPTIONS[name][1]), values.pop(name)) for name in names}
            flags = {key: (flag, value) for key, (flag, value) in flags.items() if value is not None}
            overrides = [(key, value) for key, (_, value) in flags.items()]
            typed = {key: f"{flag} {shortened(value)}" for key, (flag, value) in flags.items()}
            for text in sets or ():
                overrides.append(parse_override(text))
                typed[overrides[-1][0]] = f"--set {shortened(text)}"
            given = {"if_exists": exists} if starts else {}
            try:
                files = import_methods(values.get("methods") or "")
                config = settings_of(path and config_path(path), overrides, exists, typed)
                config = config.model_copy(update={"plugins": tuple(dict.fromkeys((*config.plugins, *files)))})
                command(config=config, **given, **values)
            except UserError as error:
                raise UserError(_in_flags(str(error), {key: flag for key, (flag, _) in flags.items()})) from None

        shared = [_parameter("config_file", _CONFIG), *(_parameter(name, _option(name)) for name in names)]
        if starts:
            shared += [_parameter("resume", _RESUME, False), _parameter("overwrite", _OVERWRITE, False)]
        shared += [_parameter("sets", _SET)]
        wrapper.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (*shared, *own)}
        return wrapper

    return decorate


_GIVEN = ("config", "if_exists")


def import_methods(listed: str) -> list[str]:
    """Files and modules of the methods that a list names; imported, so that settings may have sections of these."""
    places = []
    for name in (name.strip() for name in listed.split(",")):
        if reference := METHODS.reference(name):
            METHODS.resolve(name)
            places.append(absolute(reference[0]))
    return places


def _in_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message that names a key by the flag that was typed for it: ``lora.r: …`` becomes ``--rank: …``."""
    named = (re.match(r"([\w.]+)(: | = )(.*)", line) for line in message.splitlines())
    return "\n".join(
        f"{flags[m[1]]}{': ' if m[2] == ': ' else ' '}{m[3]}" if m and m[1] in flags else line
        for m, line in zip(named, message.splitlines(), strict=True)
    )


def _if_exists(resume: bool, overwrite: bool) -> IfExists:
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    return "resume" if resume else "overwrite" if overwrite else "ask"


def _option(name: str) -> Any:
    key, flag, metavar, offers = _OPTIONS[name]
    *path, last = key.split(".")
    field = fields_at(path, RunConfig)[last]
    default = "" if field.default is None else f" (default: {field.default})"
    words = f": {in_words(field)}" if get_origin(field.annotation) is Literal else ""
    text = escape(f"{field.description}{words}{default}")
    return Annotated[str | None, option(metavar, text, flag, autocompletion=offers)]


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


OLD = {
    "--local-epochs": "--epochs",
    "--local_epochs": "--epochs",
    "--model_name": "--model",
    "--data_path": "--data",
    "--client_num": "--clients",
    "--result_dir": "--out",
    "--to": "--out",
    "--client-id": "--client",
}
"""Old spellings, and those of the official README: they work wherever the option exists."""
_BOTH = {"--method": "--methods", "--methods": "--method", "--seed": "--seeds"}
"""One name and several names: either spelling works where only the other one exists."""
INSIGHT_ROWS = "10"
"""Test rows per client of ``fedalt report RUN --insight``."""
_UNSAID = {"--insight": INSIGHT_ROWS, "--attach": "latest"}
"""Options whose value, a number, may be left out."""
HELP = ["-h", "--help"]
_SPELT = "fedalt.spelt"


class Command(TyperCommand):
    """A command of ours: ``OLD`` spellings work, and every argument keeps its help text."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for argument in (param for param in self.params if isinstance(param, click.Argument)):
            argument.help = _help_of(argument, self.callback)

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """The same ones in any context: click keeps the option of the first that asks."""
        return HELP

    def make_parser(self, ctx: click.Context) -> Any:
        """Click's parser, which knows the other spellings, too."""
        parser = super().make_parser(ctx)
        options = (param for param in self.get_params(ctx) if isinstance(param, click.Option))
        known = {flag: option for option in options for flag in option.opts}
        for old, new in (OLD | _BOTH).items():
            if new in known and old not in known:
                parser.add_option(known[new], opts=[old], dest=known[new].name, action="store", nargs=1)
        return parser

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remember how options were spelt, and write values out that may be left out."""
        words = [word.partition("=")[0] for word in args]
        ctx.meta[_SPELT] = {new: old for old, new in (OLD | _BOTH).items() if old in words}
        full: list[str] = []
        for here, after in pairwise([*args, ""]):
            full += [here, _UNSAID[here]] if here in _UNSAID and not after.isdigit() else [here]
        return super().parse_args(ctx, full)


def only_with(flag: str, *names: str) -> None:
    """Refuse what was given beside an option that it does not go with; ``names`` are parameters that it does."""
    context = click.get_current_context()
    for param in context.command.params:
        if param.name not in names and context.get_parameter_source(param.name or "") == ParameterSource.COMMANDLINE:
            raise UserError(f"{_name(param, context)} has no effect with {flag}; leave it out")


def spelt(flag: str, context: click.Context | None = None) -> str:
    """An option as it was typed, in this context or the present one."""
    context = context or click.get_current_context(silent=True)
    known: dict[str, str] = context.meta.get(_SPELT, {}) if context else {}
    return known.get(flag, flag)


def usage_line(error: click.UsageError) -> str:
    """What is wrong with the command line, in one line; nothing where the help page says it all."""
    if isinstance(error, NoArgsIsHelpError):
        return ""
    see = f"; see {error.ctx.command_path} --help" if error.ctx else ""
    if isinstance(error, click.NoSuchOption):
        return f"{error.option_name}: no such option{did_you_mean(error.option_name, error.possibilities or ())}{see}"
    if isinstance(error, click.MissingParameter) and error.param:
        return f"{_name(error.param, error.ctx)} is missing{see}"
    if isinstance(error, click.BadParameter) and error.param:
        return f"{_name(error.param, error.ctx)}: {_wanted(error.param.type) or error.message.rstrip('.')}{see}"
    return f"{error.format_message().rstrip('.')}{see}"


def _name(param: click.Parameter, context: click.Context | None) -> str:
    return (
        spelt(param.opts[0], context)
        if isinstance(param, click.Option)
        else param.metavar or (param.name or "").upper()
    )


def _wanted(kind: Any) -> str:
    """What a value must be; nothing where click's own message says it better."""
    if isinstance(kind, click.Choice):
        return f"must be {alternatives(kind.choices)}"
    name = {"integer": "a whole number", "float": "a number"}.get(kind.name.removesuffix(" range"))
    limits = ((word, getattr(kind, end, None)) for word, end in (("at least", "min"), ("at most", "max")))
    return (
        ", ".join([f"must be {name}", *(f"{word} {limit:g}" for word, limit in limits if limit is not None)])
        if name
        else ""
    )


def _help_of(argument: click.Argument, callback: Any) -> str | None:
    """The help text in the signature: Click 8.4 and later overwrite what Typer has set."""
    parameter = inspect.signature(callback, eval_str=True).parameters[str(argument.name)]
    metadata = getattr(parameter.annotation, "__metadata__", ())
    return next((one.help for one in metadata if isinstance(one, ArgumentInfo)), None)
