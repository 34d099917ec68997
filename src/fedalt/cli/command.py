"""What Typer's commands lack: old spellings of options, values that may be left out, errors in one line."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError
from typer.core import TyperCommand
from typer.models import ArgumentInfo

from fedalt.errors import alternatives, did_you_mean

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
_SPELT = "fedalt.spelt"


class Command(TyperCommand):
    """A command of ours: ``OLD`` spellings work, and every argument keeps its help text."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for argument in (param for param in self.params if isinstance(param, click.Argument)):
            argument.help = _help_of(argument, self.callback)

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
        """Remember how options were spelt, and write the number of ``--insight`` out where it is missing."""
        words = [word.partition("=")[0] for word in args]
        ctx.meta[_SPELT] = {new: old for old, new in (OLD | _BOTH).items() if old in words}
        full: list[str] = []
        for here, after in pairwise([*args, ""]):
            full += [here, INSIGHT_ROWS] if here == "--insight" and not after.isdigit() else [here]
        return super().parse_args(ctx, full)


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
