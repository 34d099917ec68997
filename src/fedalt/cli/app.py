"""The commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.markup import escape
from rich.table import Table

from fedalt.cli import show
from fedalt.cli.advise import advise
from fedalt.cli.audit import audit
from fedalt.cli.bench import bench
from fedalt.cli.compare import compare
from fedalt.cli.dashboard import dashboard
from fedalt.cli.data import data as data_group
from fedalt.cli.data import partition
from fedalt.cli.data import prepare as prepare_group
from fedalt.cli.deploy import certs, drain, server, site, status, submit
from fedalt.cli.flags import HELP, INSIGHT_ROWS, OLD, Command, settings
from fedalt.cli.known import env, methods, metrics
from fedalt.cli.out import Client, Round, RunPath, figures, push
from fedalt.cli.recipes import recipes
from fedalt.cli.show import Json, option, print_json, say, switch
from fedalt.config import RunConfig
from fedalt.errors import UserError
from fedalt.evaluation.metrics import metric_of
from fedalt.runs.folder import IfExists, Which

app = typer.Typer(
    name="fedalt",
    help="Personalised federated fine-tuning of language models with LoRA.",
    no_args_is_help=True,
    suggest_commands=False,  # Click has suggestions of its own
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP},
)


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"} | {
    name: name for name in ("bfloat16", "float16", "float32")
}
"""Spelling of ``--dtype`` → its name in PyTorch."""


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        say(f"fedalt {version('fedalt')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, switch("print the version and exit", "--version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Personalised federated fine-tuning of language models with LoRA."""


@settings()
def run(config: RunConfig, if_exists: IfExists, as_json: Json = False) -> None:
    """Train one method, score every client, save every client's model."""
    from fedalt.start import run_one

    experiment, folder, scores = run_one(config, if_exists, show.live(config.federation.rounds))
    tasks = {str(client): data.train[0].task for client, data in experiment.federation.clients.items()}
    show.say_run(folder, {"title": experiment.method.title, **scores}, tasks, as_json)


def evaluate(
    run: RunPath,
    client: Annotated[int | None, option("N", "only this client")] = None,
    *,
    data: Annotated[str | None, option("DATA", "other rows than the run's own")] = None,
    central: Annotated[
        bool, switch("every client's model on the test rows of all clients together", "--central")
    ] = False,
    lm_eval: Annotated[str | None, option("TASKS", "tasks of lm-evaluation-harness, or YAML files of such")] = None,
    which: Round = None,
    as_json: Json = False,
) -> None:
    """Score a run's saved adapters again."""
    if lm_eval:
        if data or central:
            raise UserError("--lm-eval: its tasks have rows of their own; leave --data and --central out")
        _harness(run, client, [task.strip() for task in lm_eval.split(",")], which, as_json)
        return
    from fedalt.evaluation.metrics import metrics_in
    from fedalt.personal.rescore import rescore
    from fedalt.runs.folder import final_scores, kept, open_run

    scored = rescore(run, client, data, central, which)
    scores = {str(c): evaluation.scores for c, evaluation in scored.items()}
    if as_json:
        print_json({"run": str(run), "clients": scores})
        return
    final = final_scores(open_run(run)[0])
    own = kept(final) if which is None else final["last" if which == "last" else "best_validation"]
    last = {"round": own["round"], "clients": scores}
    block = {**final, "title": str(run), "last": last, "best_validation": None, "kept": "last"}
    show.out.print(show.run_table(block, {c: ", ".join(s["categories"]) for c, s in scores.items()}))
    if data is None and not central:
        same = all(own["clients"][c] == metrics_in(s) for c, s in scores.items())
        show.out.print("equal to the run's own scores" if same else "[red]not equal to the run's own scores[/]")


def _harness(run: Path, client: int | None, tasks: list[str], which: Which | None, as_json: bool) -> None:
    from fedalt.personal.harness import harness

    found = harness(run, client, tasks, which)
    if as_json:
        print_json({"run": str(run), "clients": found})
        return
    table = Table("client", "task", "metric", "value", "±")
    for one, results in found.items():
        for task, values in results.items():
            for name, value in values.items():
                metric, _, kept = name.partition(",")
                if isinstance(value, float) and not metric.endswith("_stderr"):
                    error = values.get(f"{metric}_stderr,{kept}")
                    spread = f"{error:.4f}" if isinstance(error, float) else ""
                    table.add_row(str(one), task, f"{metric} ({kept})", f"{value:.4f}", spread)
    show.out.print(table)


def generate(
    run: RunPath,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="an instruction; a chat loop when not given")
    ] = None,
    *,
    client: Annotated[int | None, option("N", "client id")] = None,
    compare: Annotated[str | None, option("N,M", "several clients' answers side by side")] = None,
    show_alpha: Annotated[bool, switch("shade each token by the mixer's weights", "--show-alpha")] = False,
    temperature: Annotated[float | None, option("X", "draw tokens; 0 is greedy (the default)", min=0)] = None,
    top_p: Annotated[
        float | None, option("X", "draw from the likeliest tokens with so much probability", min=0, max=1)
    ] = None,
    max_new_tokens: Annotated[int | None, option("N", "longest answer (default: the run's)", min=1)] = None,
    seed: Annotated[int | None, option("N", "of the draws (default: 0)")] = None,
    turns: Annotated[bool, switch("a chat loop that remembers what was said", "--turns")] = False,
    which: Round = None,
) -> None:
    """Answer as one client's model, or as several clients' side by side."""
    from fedalt.evaluation.generate import Sampling
    from fedalt.personal.chat import Chat, Manner

    draws = temperature != 0 and (temperature is not None or top_p is not None)
    if seed is not None and not draws:
        raise UserError("--seed is for answers that are drawn; give --temperature or --top-p")
    if temperature == 0 and top_p is not None:
        raise UserError("--top-p is for answers that are drawn; --temperature 0 draws none")
    sampling = Sampling(temperature or 1.0, 1.0 if top_p is None else top_p, seed or 0) if draws else None
    clients = _clients(client, compare)
    manner, chats = Manner(sampling, max_new_tokens, turns), list[Chat]()
    for one in clients:
        chats.append(Chat(run, one, chats[0].resident if chats else None, which, manner))
    if show_alpha and compare is not None:
        raise UserError("--show-alpha is for one --client")
    if show_alpha and not chats[0].placement.mixed:
        raise UserError(f"{run}: --show-alpha needs a mixer, and this method has none")
    streams = show.out.is_terminal and compare is None and not chats[0].config.classifies
    for instruction in [prompt] if prompt is not None else _ask(clients):
        answers = [chat.ask(instruction, _tell if streams else None) for chat in chats]
        if compare is not None:
            show.out.print(show.answer_table({c: _text(answer) for c, answer in zip(clients, answers, strict=True)}))
            continue
        (answer,) = answers
        streamed = streams and chats[0].streams
        _tell("\n" if streamed else f"{_text(answer)}\n")
        if show_alpha and answer.alpha:
            show.out.print(show.alpha_line(answer.alpha, answer.slots[0]), soft_wrap=True)


def export(
    run: RunPath,
    client: Client,
    out: Annotated[Path, option("DIR", "new folder")],
    *,
    static: Annotated[bool, switch("one LoRA with the mixer frozen, and what that costs", "--static")] = False,
    merge: Annotated[
        bool, switch("that LoRA merged into the base: a model folder that needs no PEFT", "--merge")
    ] = False,
    dtype: Annotated[
        str | None,
        option("DTYPE", "of a merged model's weights (default: the run's own)", click_type=click.Choice(DTYPES)),
    ] = None,
    gguf: Annotated[
        str | None,
        option(
            "KIND",
            "the merged model as one file for llama.cpp and Ollama: q8_0 or f16; with --merge, beside the folder",
            click_type=click.Choice(("q8_0", "f16")),
        ),
    ] = None,
    which: Round = None,
) -> None:
    """Take one client's model away: PEFT folders and mixer, one static LoRA, a merged model, or a GGUF file."""
    from fedalt.evaluation.metrics import metric_of
    from fedalt.personal.export import Form, export_folders, export_merged, export_static

    if static and (merge or gguf):
        raise UserError(f"--static writes a LoRA, {'--merge' if merge else '--gguf'} a model; give one of them")
    if dtype and not merge:
        raise UserError("--dtype is for --merge")
    if not (static or merge or gguf):
        export_folders(run, client, out, which)
        say(f"wrote {out}")
        return
    if static:
        cost = export_static(run, client, out, which)
    else:
        form = Form(dtype and DTYPES[dtype], gguf, model=merge)
        cost = export_merged(run, client, out, which, form=form)
    say(f"wrote {out}")
    text = metric_of(cost.metric).text
    show.out.print(
        f"client {client}, own test rows: personal {text(cost.personal)}, static {text(cost.static)} "
        f"({text(cost.static - cost.personal, sign=True)})"
    )
    for note in cost.notes:
        say(f"note: {note}")


def onboard(
    run: RunPath,
    *,
    data: Annotated[
        str | None, option("DATA", "the newcomers' rows; the run's data.held_out clients if not given")
    ] = None,
    epochs: Annotated[int, option("N", "epochs over their own rows; 0: none", min=0)] = 5,
    out: Annotated[Path | None, option("DIR", "where they go (default: RUN/newcomers)")] = None,
    overwrite: Annotated[bool, switch("replace newcomers that are there", "--overwrite")] = False,
    as_json: Json = False,
) -> None:
    """Give new clients what a finished run has learnt, let them train a little, score them before and after."""
    from fedalt.personal.onboard import onboard as join

    joined = join(run, data, epochs, out, "overwrite" if overwrite else "ask")
    if as_json:
        print_json(joined)
        return
    show.out.print(_newcomers_table(joined))
    say(f"models   {joined['folder']}")


def _newcomers_table(joined: dict[str, Any]) -> Table:
    metric = metric_of(joined["metric"])
    table = Table(title=f"newcomers of {joined['run']}: {metric.title} on their own test rows", title_justify="left")
    for name in ("client", "task"):
        table.add_column(name)
    for name in ("rows", "at once", f"after {joined['epochs']} epochs"):
        table.add_column(name, justify="right")
    for client, one in joined["clients"].items():
        scores = (metric.text(one[point][metric.name]) for point in ("before", "after"))
        table.add_row(client, one["task"], str(one["rows"]), *scores)
    table.add_section()
    for title, key in (("mean", "mean"), ("worst", "worst"), ("10th percentile", "p10")):
        values = (metric.text(joined[point][key]) for point in ("before", "after"))
        table.add_row(title, "", "", *values, style="bold" if key == "mean" else None)
    return table


def report(
    run: RunPath,
    insight: Annotated[
        int | None,
        option(
            "[N]",
            f"first try every client's model on N test rows of every client (default: {INSIGHT_ROWS}) and look "
            "at its mixer",
            min=0,
        ),
    ] = None,
    alone: Annotated[
        bool, switch("at a site: first train its client without the others, with the same settings", "--alone")
    ] = False,
) -> None:
    """Rebuild report.html from the run's log, insight.json and audit.json; at a site (STATE/RUN) its own."""
    from fedalt.flower.own_report import state_of, write_own_report
    from fedalt.report.html import write_report
    from fedalt.report.insights import look
    from fedalt.runs.folder import finished_run, open_run

    state = state_of(run)
    if alone and state is None:
        raise UserError(f"{run}: --alone is for a run at a site, STATE/RUN")
    if insight is not None:
        look(finished_run(run)[0], insight)
    if alone and state:
        from fedalt.flower.trainer import site_in

        site = site_in(state)
        with show.live(1) as progress:
            site.train_alone(run.absolute().name, progress)
    say(f"wrote {(write_own_report if state else write_report)(open_run(run)[0])}")


@settings(starts=False)
def validate(config: RunConfig, as_json: Json = False) -> None:
    """Check everything that can be checked before the first step, and estimate memory and time. Writes nothing."""
    from fedalt.runs.devices import check_devices
    from fedalt.runs.preview import estimate, row_table
    from fedalt.runs.setup import prepare
    from fedalt.runs.trackers import check_trackers

    check_trackers(config.report.trackers)
    check_devices(config)
    experiment = prepare(config)
    rows, cost = row_table(experiment), estimate(experiment)
    if as_json:
        told = {"config": config.model_dump(mode="json"), "clients": rows, "notes": experiment.notes}
        print_json({**told, "estimate": asdict(cost)})
        return
    show.say_notes(experiment.notes)
    show.out.print(show.row_table(rows))
    show.out.print(show.estimate_lines(cost, experiment.config.federation.rounds), highlight=False, soft_wrap=True)


GROUPS: dict[str, dict[Callable[..., None], str]] = {
    "Experiments": {
        validate: "fedalt validate demo",
        run: "fedalt run demo --method fedalt --out runs/mine",
        compare: "fedalt compare demo --methods local,fedit,fedalt --seeds 0,1,2",
        evaluate: "fedalt evaluate runs/mine --central",
        report: "fedalt report runs/mine --insight",
        audit: "fedalt audit runs/mine --client 3",
        figures: "fedalt figures runs/mine --format pdf,svg",
        dashboard: "fedalt dashboard runs",
    },
    "Models": {
        generate: 'fedalt generate runs/mine --client 3 "Greet Ada."',
        export: "fedalt export runs/mine --client 3 --out client3",
        push: "fedalt push runs/mine --client 3 --repo me/client3",
        onboard: "fedalt onboard runs/mine --data newcomers --epochs 5",
        advise: "fedalt advise runs/fedalt_joint-reviews-seed0",
    },
    "Data": {
        partition: "fedalt partition --data rows.csv --clients 10 --out partition",
    },
    "Across sites": {
        certs: "fedalt certs --out tls --sites 3 --host server.example.org",
        server: "fedalt server --public 0.0.0.0:9443 --tls tls",
        site: "fedalt site --client 0 --data mine --state state --server HOST:9443",
        submit: "fedalt submit tinyworld --clients 3 --tls tls",
        status: "fedalt status --ca tls/ca.crt --state flower-server",
        drain: "fedalt drain /var/lib/fedalt/site",
    },
    "Tools": {
        methods: "fedalt methods feddpa_t",
        metrics: "fedalt metrics rougeL",
        recipes: "fedalt recipes demo --out mine.yaml",
        env: "fedalt env --json",
        bench: "fedalt bench round --against peft --model tiny --clients 2",
    },
}
"""Help panel → command → an example of it."""

_OTHERS = f"Other spellings, in every command: {', '.join(f'{old} for {new}' for old, new in OLD.items())}."

for panel, commands in GROUPS.items():
    for command, example in commands.items():
        epilog = f"Example: {escape(example)}" + (f"\n\n{_OTHERS}" if command is run else "")
        app.command(cls=Command, rich_help_panel=panel, epilog=epilog)(command)
app.add_typer(prepare_group, name="prepare", rich_help_panel="Data")
app.add_typer(data_group, name="data", rich_help_panel="Data")


def _clients(client: int | None, compare: str | None) -> list[int]:
    if (client is None) == (compare is None):
        raise UserError("give --client N, or --compare N,M for several clients")
    try:
        return [client] if client is not None else [int(part) for part in str(compare).split(",")]
    except ValueError:
        raise UserError(f"--compare: {compare} is no list of clients, as in 0,3") from None


def _text(answer: Any) -> str:
    """An answer with the chances of classes, if there are such."""
    chances = ", ".join(f"{name} {chance:.3f}" for name, chance in list(answer.chances.items())[:5])
    return f"{answer.text} ({chances})" if chances else str(answer.text)


def _tell(text: str) -> None:
    show.out.print(text, end="", markup=False, highlight=False, soft_wrap=True)


def _ask(clients: list[int]) -> Any:
    who = f"client {clients[0]}" if len(clients) == 1 else f"clients {', '.join(map(str, clients))}"
    show.err.print(f"[dim]{who}; an empty line or Ctrl-D ends[/]")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
