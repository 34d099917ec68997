"""What ``import fedalt`` offers, as objects over the rooms below: nothing here computes a number."""

from __future__ import annotations

import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

from rich.console import Console

from fedalt.comparisons.compare import compare as train_all
from fedalt.comparisons.jobs import Budget
from fedalt.comparisons.sweep import axes_of, grids, sweep_lines
from fedalt.comparisons.sweep import sweep as train_points
from fedalt.comparisons.tables import client_lines, finding, latex, markdown, score_grid
from fedalt.config import RunConfig, with_settings
from fedalt.data.federation import ClientData, Federation, Row
from fedalt.data.load import Rows
from fedalt.data.partition_settings import Partition
from fedalt.data.sources.given import Given, given_source, handed_on
from fedalt.errors import UserError, did_you_mean, listed, needs
from fedalt.evaluation.metrics import metric_of
from fedalt.files import read_json, write_text
from fedalt.methods.registry import as_variant
from fedalt.personal.chat import Answer, Chat
from fedalt.personal.export import export_folders
from fedalt.progress import in_notebook, on_terminal
from fedalt.report.html import write_comparison_report, write_report, write_reports, write_sweep_reports
from fedalt.report.insights import look
from fedalt.report.sweep import write_sweep_report
from fedalt.runs.client_folder import client_ids
from fedalt.runs.events import Sink
from fedalt.runs.folder import (
    History,
    IfExists,
    RunFolder,
    finished_run,
    kept_scores,
    open_run,
    read_history,
    settings_of,
)
from fedalt.runs.scoring import Scores
from fedalt.runs.setup import Bases
from fedalt.runs.simulation import Rounds
from fedalt.start import run_one

if TYPE_CHECKING:
    import pandas

KEYWORDS = {
    "rounds": "federation.rounds",
    "local_epochs": "training.local_epochs",
    "epochs": "training.local_epochs",
    "lr": "training.lr",
    "batch_size": "training.batch_size",
    "rank": "lora.r",
    "targets": "lora.targets",
    "seed": "seed",
    "devices": "federation.devices",
}
"""Short name of a setting, as the command line has it → its dotted key."""
_ELSEWHERE = {
    "clients": "load_data",
    "data": "load_data",
    "dtype": "load_base",
    "device": "load_base",
    "model": "load_base",
}
"""Short names of the command line that belong to another function here."""


# ----------------------------------------------------------------------------------------------------- rows and a base


class Data:
    """Rows of all clients, read once. ``load_data`` makes it.

    >>> import fedalt as fa
    >>> data = fa.load_data("tinyworld", clients=2, train_limit=8, test_limit=4)
    >>> data
    <Data tinyworld (seed 0, clash 0.5): 2 clients; 16 train, 8 validation, 8 test rows; tasks: 2>
    >>> data.clients[0].train[0].task
    'tiny_commonsense'

    Attributes:
        settings: Dotted key → value, as given.
        rows: What is in memory.
    """

    def __init__(self, settings: Mapping[str, Any], rows: Rows | None = None) -> None:
        self.settings = dict(settings)
        self.rows = rows or Rows()
        self._config = with_settings(RunConfig(), self.settings, "load_data")

    @property
    def federation(self) -> Federation:
        """The clients that take part, as the settings deal them; where these name no seed, as with the default one."""
        return self.rows.both(self._config.data, self._config.seed)[0]

    @property
    def clients(self) -> dict[int, ClientData]:
        """Client → its rows."""
        return self.federation.clients

    def __repr__(self) -> str:
        clients = self.clients
        tasks = list(dict.fromkeys(row.task for mine in clients.values() for row in mine.train if row.task))
        rows = {s: sum(len(getattr(mine, s)) for mine in clients.values()) for s in ("train", "validation", "test")}
        counted = ", ".join(f"{count} {split}" for split, count in rows.items() if count)
        listing = ", ".join(tasks)
        if len(listing) > 30:
            listing = str(len(tasks))
        named = f"; tasks: {listing}" if tasks else ""
        return f"<Data {self.federation.source}: {len(clients)} clients; {counted} rows{named}>"


class Base:
    """A frozen base model, in memory once for all runs. ``load_base`` makes it.

    >>> import fedalt as fa
    >>> fa.load_base("tiny-base")
    <Base tiny-base: causal_lm, float32>

    Attributes:
        settings: Dotted key → value, as given.
        bases: What is in memory.
    """

    def __init__(self, settings: Mapping[str, Any], bases: Bases | None = None) -> None:
        self.settings = dict(settings)
        self.bases = bases or Bases()
        self._config = with_settings(RunConfig(), self.settings, "load_base")

    def __repr__(self) -> str:
        model = self._config.model
        return f"<Base {model.name}: {model.task}, {model.load_in or model.dtype}>"


def load_data(
    source: str | Path | Mapping[Any, Any] | Sequence[Any] = "tinyworld",
    *,
    clients: int | None = None,
    partition: Partition | str | Path | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Data:
    """Read rows and deal them to clients.

    >>> import fedalt as fa
    >>> mine = [{"text": f"good {i}", "label": "yes"} for i in range(9)] + [{"text": "bad", "label": "no"}] * 9
    >>> fa.load_data({"ann": (mine, mine[:4]), "ben": (mine, mine[9:])})
    <Data memory:a9568226a314: 2 clients; 36 train, 13 test rows; tasks: ann, ben>
    >>> fa.load_data(mine, clients=2, partition=fa.Iid(min_rows=5), seed=0)
    <Data memory:df72cb2c586a: 2 clients; 14 train, 4 test rows>

    Args:
        source: A path or a name, as ``fedalt run --data`` takes it; or rows in memory: ``{name: (train, test)}`` or
            ``{name: (train, validation, test)}`` for clients in this order, or a list of rows, ``{split: rows}``, a
            ``datasets.Dataset`` or ``DatasetDict`` that is dealt to clients. Rows are mappings, ``instruction`` and
            ``output`` or ``text`` and ``label``, perhaps with ``task`` and ``category``, or a ``Dataset``.
        clients: How many.
        partition: How rows are dealt: ``fedalt.Dirichlet(0.5)`` and its like, the name of a registered partitioner, or
            a ``partition.json`` of another run.
        seed: Of the deal; every run's own when not given.
        settings: Any other setting of ``data``: ``train_limit=100``, ``label_column="stars"``, ``template="chat"``, …

    Raises:
        UserError: The rows cannot be had, or not be dealt so, or a setting is unknown.
    """
    values = {
        "data.clients": clients,
        **_partition(partition),
        "data.partition.seed": seed,
        **{f"data.{name}": value for name, value in settings.items()},
    }
    values = {key: value for key, value in values.items() if value is not None}
    rows = Rows()
    if isinstance(source, str | Path):
        values["data.source"] = str(source)
    else:
        rows = Rows(Given(source))
        read = rows.read(with_settings(RunConfig(), {**values, "data.source": "memory"}, "load_data").data)
        values["data.source"] = given_source(read)
    data = Data(values, rows)
    data.federation  # noqa: B018 - what is wrong with the rows is said here
    return data


def load_base(name: str | Path = "tiny-base", *, targets: Sequence[str] | None = None, **settings: Any) -> Base:
    """Load a base model, to be kept in memory for all runs on it.

    >>> import fedalt as fa
    >>> fa.load_base("tiny-base", dtype="bfloat16", device="cpu")
    <Base tiny-base: causal_lm, bfloat16>

    Args:
        name: A folder, a name on the Hugging Face hub, ``tiny-base``, or ``minilm``.
        targets: Names of the linear layers to adapt; by architecture when not given.
        settings: Any other setting of ``model``: ``dtype``, ``device``, ``load_in``, ``task``, ``labels``, ``pooling``,
            ``gradient_checkpointing``. A classifier whose labels are not given is loaded with the first run, when they
            are known.

    Raises:
        UserError: The model cannot be had, or a setting is unknown.
    """
    values = {"model.name": str(name), **{f"model.{key}": value for key, value in settings.items()}}
    base = Base(values | ({} if targets is None else {"lora.targets": tuple(targets)}))
    config = with_settings(RunConfig(), base.settings, "load_base")
    if not config.classifies or config.model.labels:
        base.bases.of(config)
    return base


class _InFolder:
    """What has a folder, perhaps a temporary one."""

    _place: _Place

    def close(self) -> None:
        """Remove what was trained, if its folder is a temporary one."""
        self._place.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------------------ one run


def run(
    data: Data | str | Path,
    base: Base | str | Path,
    method: Any = "fedalt",
    *,
    out: str | Path | None = None,
    config: str | Path | RunConfig | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **short: Any,
) -> Run:
    """Train one method, score every client, keep every client's model; the numbers are those of ``fedalt run``.

    >>> import fedalt as fa
    >>> data = fa.load_data("tinyworld", clients=2, train_limit=8, test_limit=4)
    >>> run = fa.run(data, fa.load_base(), method="fedit", rounds=1, epochs=1, lr=3e-3, seed=0, quiet=True)
    >>> sorted(run.scores.clients)
    [0, 1]

    Args:
        data: From ``load_data``, or what that takes first.
        base: From ``load_base``, or a model's name.
        method: A name, ``FILE.py:Name``, ``module:Name``, a class, or a method with settings: ``FedProx(mu=0.1)``.
        out: Folder of the run. Without it the run is in a temporary folder, which goes when the run is closed or
            nobody holds it any more.
        config: A YAML file of settings, or settings; what is given besides replaces them.
        settings: Dotted key → value, for example ``{"lora.dropout": 0}``; a section may be a mapping.
        resume: Go on at the last finished round, or start.
        overwrite: Replace a run that is in the folder.
        quiet: No progress bar.
        short: ``rounds``, ``epochs`` (``local_epochs``), ``lr``, ``batch_size``, ``rank``, ``targets``, ``seed``,
            ``devices``.

    Raises:
        UserError: Anything that is wrong with the settings, the rows, the model or the folder.
    """
    data, base = _data(data), _base(base)
    place, if_exists = _Place(out), _if_exists(resume, overwrite)
    wanted = {**_short("run", short), **_dotted(settings), **_method(method), "out": str(place.path)}
    full = _config(data, base, wanted, config, if_exists)
    with _handed_on(data, full.federation.devices is not None):
        run_one(full, if_exists, _bar(full.federation.rounds, quiet), base.bases, data.rows)
    return Run(place.path, base, data.rows, place)


def load_run(path: str | Path, data: Data | None = None, base: Base | None = None) -> Run:
    """Open a run that is on disk, whoever made it.

    >>> import fedalt as fa, tempfile
    >>> data, folder = fa.load_data("tinyworld", clients=2, train_limit=8, test_limit=4), tempfile.mkdtemp()
    >>> _ = fa.run(data, "tiny-base", "local", rounds=1, epochs=1, out=folder, quiet=True)
    >>> sorted(fa.load_run(folder).history.losses)
    [0, 1]

    Args:
        path: The run's folder.
        data: Its rows, where they were given in memory or are in memory.
        base: Its base model, where that is in memory.

    Raises:
        UserError: There is no run in the folder.
    """
    folder, _ = open_run(Path(path).expanduser())
    return Run(folder.path, base or Base({}), data.rows if data else Rows(), _Place(folder.path))


class Run(_InFolder):
    """A run and what has come of it. ``run`` and ``load_run`` make it.

    >>> import fedalt as fa
    >>> data = fa.load_data("tinyworld", clients=2, train_limit=8, test_limit=4)
    >>> with fa.run(data, "tiny-base", rounds=2, epochs=1, seed=0, quiet=True) as run:
    ...     sorted(run.history.losses[0])
    ...     len(run.client(0).answer("Is the sea wet?")) > 0
    [1, 2]
    True

    Attributes:
        folder: Where everything is that the run has written.
    """

    def __init__(self, folder: Path, base: Base, rows: Rows, place: _Place) -> None:
        self.folder = folder
        self._base, self._rows, self._place = base, rows, place

    @cached_property
    def config(self) -> RunConfig:
        """Its settings."""
        return open_run(self.folder)[1]

    @property
    def data(self) -> Data:
        """Its rows, dealt as in the run."""
        return Data({"data": self.config.data.model_dump(), "seed": self.config.seed}, self._rows)

    @property
    def history(self) -> History:
        """Losses, scores and mixer weights by client and round, as far as the run has come."""
        return read_history(self.folder)

    @property
    def scores(self) -> Scores:
        """Scores of the models that clients keep: after the last round, or with early stopping the best one.

        Raises:
            UserError: The run has not finished.
        """
        folder, config = finished_run(self.folder)
        final = kept_scores(folder)
        return Scores.of(config.metric, final["round"], {int(c): scores for c, scores in final["clients"].items()})

    @property
    def clients(self) -> tuple[int, ...]:
        """Ids of the clients that have a model."""
        return tuple(client_ids(RunFolder(self.folder)))

    def client(self, client: int | str) -> Client:
        """One client, by its id, or by the name that ``load_data`` gave it.

        Raises:
            UserError: There is no such client.
        """
        names = {str(task): int(number) for number, task in self.history.tasks.items()}
        number = names.get(client, -1) if isinstance(client, str) else client
        if number not in self.clients:
            hint, known = did_you_mean(str(client), names), listed(self.clients) or "none"
            raise UserError(f'{self.folder}: no client "{client}" here{hint}; known: {known}')
        return Client(self, number)

    def report(self, path: str | Path | None = None, insight: int = 0) -> Path:
        """Write the report, one HTML file that needs no network.

        Args:
            path: Where; ``report.html`` in the run's folder when not given.
            insight: Test rows per client on which every client's model is tried.
        """
        folder = RunFolder(self.folder)
        if folder.final_scores.is_file():
            look(folder, insight, self._base.bases.of(self.config) if insight else None, self._rows)
        return _copied(write_report(folder), path)

    def __repr__(self) -> str:
        about = f"{self.config.method}, seed {self.config.seed}"
        if not RunFolder(self.folder).final_scores.is_file():
            return f"<Run {about}: not finished; {self.folder}>"
        scores, text = self.scores, metric_of(self.config.metric).text
        return f"<Run {about}: {scores.metric} mean {text(scores.mean)}, worst {text(scores.worst)}; {self.folder}>"


class Client:
    """One client's model. ``Run.client`` makes it.

    >>> import fedalt as fa, tempfile
    >>> data = fa.load_data("tinyworld", clients=2, train_limit=8, test_limit=4)
    >>> run = fa.run(data, "tiny-base", rounds=1, epochs=1, seed=0, quiet=True)
    >>> folder = run.client(1).save_peft(tempfile.mkdtemp())
    >>> (folder / "individual" / "adapter_model.safetensors").is_file()
    True

    Attributes:
        id: Its number.
    """

    def __init__(self, run: Run, client: int) -> None:
        self.id = client
        self._run = run

    @property
    def scores(self) -> dict[str, float]:
        """Its scores after the last round, by metric."""
        return self._run.scores.details[self.id]

    def answer(self, text: str) -> str:
        """What it says to an instruction; the class of a text, or of the image in a file."""
        return self.ask(text).text

    def ask(self, asked: str | Row) -> Answer:
        """The same with where the mixer looked and with the chances of all classes; a row may be asked, too."""
        return self._chat.ask(asked)

    def save_peft(self, path: str | Path) -> Path:
        """Copy its LoRAs, each a folder that PEFT reads, its mixer and ``fedalt_config.json`` into a new folder."""
        export_folders(self._run.folder, self.id, Path(path))
        return Path(path)

    @cached_property
    def _chat(self) -> Chat:
        run = self._run
        return Chat(run.folder, self.id, run._base.bases.of(run.config))

    def __repr__(self) -> str:
        return f"<Client {self.id} of {self._run!r}>"


# ------------------------------------------------------------------------------------------------------ several runs


@overload
def compare(
    data: Data | str | Path,
    base: Base | str | Path,
    methods: Sequence[Any],
    seeds: Sequence[int] | None = None,
    *,
    sweep: None = None,
    **given: Any,
) -> Comparison: ...
@overload
def compare(
    data: Data | str | Path,
    base: Base | str | Path,
    methods: Sequence[Any],
    seeds: Sequence[int] | None = None,
    *,
    sweep: Mapping[str, Sequence[Any]],
    **given: Any,
) -> Sweep: ...
def compare(
    data: Data | str | Path,
    base: Base | str | Path,
    methods: Sequence[Any],
    seeds: Sequence[int] | None = None,
    *,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    jobs: int = 1,
    out: str | Path | None = None,
    config: str | Path | RunConfig | None = None,
    settings: Mapping[str, Any] | None = None,
    match_budget: Budget | None = None,
    partitions: int | None = None,
    margin: float | None = None,
    tune: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **short: Any,
) -> Comparison | Sweep:
    """Train several methods with several seeds on the same rows, and put them side by side; ``fedalt compare``.

    >>> import fedalt as fa
    >>> data = fa.load_data("tinyworld", clients=2, train_limit=8, test_limit=4)
    >>> table = fa.compare(data, fa.load_base(), ["local", "fedit"], seeds=[0], rounds=1, epochs=1, quiet=True)
    >>> list(table.table)
    ['local', 'fedit']

    With ``sweep``, all of it once per value, or per combination of values of several settings; ``--sweep``:

    >>> rates = fa.compare(data, "tiny-base", ["local"], rounds=1, epochs=1, quiet=True, sweep={"lr": [1e-3, 2e-3]})
    >>> list(rates.points)
    ['training.lr=0.001', 'training.lr=0.002']

    Args:
        data: From ``load_data``, or what that takes first.
        base: From ``load_base``, or a model's name.
        methods: Methods, each as ``run`` takes it; the same one with other settings counts as another.
        seeds: Seeds of start values, row order, dropout and participation; of the deal, too, unless ``load_data`` was
            given one. The settings' seed when not given.
        sweep: Dotted key, or short name, of a setting → its values.
        jobs: Processes that share the runs; each holds a base of its own.
        out: Folder of the comparison; a temporary one, as for ``run``, when not given.
        config: A YAML file of settings, or settings; what is given besides replaces them.
        settings: Dotted key → value.
        match_budget: Choose each method's rank for the same ``parameters``, or ``bytes``, per client.
        partitions: Draw rows, or deal them, so many times, each with every seed; else every seed draws its own.
        margin: Differences below it do not matter; 1 where scores run from 0 to 100, otherwise none, when not given.
        tune: First so many trials per method on validation rows: learning rate and the method's own settings.
        resume: Go on where a comparison has stopped.
        overwrite: Replace runs that are in the folder.
        quiet: No progress bars.
        short: As for ``run``, without ``seed``.

    Raises:
        UserError: As for ``run``, checked for all methods before the first one starts.
    """
    data, base = _data(data), _base(base)
    if "seed" in short:
        raise UserError("compare: give seeds=[…], not seed")
    if_exists = _if_exists(resume, overwrite)
    full = _config(data, base, {**_short("compare", short), **_dotted(settings)}, config, "ask")
    entrants = [as_variant(method) for method in ([methods] if isinstance(methods, str) else methods)]
    place = _Place(out)
    given = (full, entrants, [full.seed] if seeds is None else seeds, place.path)
    rest: Any = {"budget": match_budget, "partitions": partitions, "margin": margin, "jobs": jobs}
    processes = jobs > 1 or full.federation.devices is not None
    rest |= {"if_exists": if_exists, "bases": base.bases, "rows": data.rows}
    axes = axes_of({KEYWORDS.get(key, key): values for key, values in (sweep or {}).items()})
    if tune and axes:
        raise UserError("compare: tune and sweep exclude each other")
    with _handed_on(data, processes), _bar(full.federation.rounds, quiet) as sink:
        if axes:
            content = train_points(full, axes, *given[1:], sink=sink, **rest)
        else:
            content = train_all(*given, sink=sink, tune=tune, **rest)

    def reports(folder: Path, comparison: Mapping[str, Any]) -> Path:
        return write_reports(folder, comparison, full.report.insight, base.bases, data.rows)

    if axes:
        write_sweep_reports(place.path, content, reports)
        return Sweep(content, base, data.rows, place)
    reports(place.path, content)
    return Comparison(content, base, data.rows, place)


class Sweep(_InFolder):
    """A comparison per value of a setting. ``compare`` makes it.

    >>> import fedalt as fa
    >>> data = fa.load_data("tinyworld", clients=2, train_limit=8, test_limit=4)
    >>> ranks = fa.compare(data, "tiny-base", ["local"], rounds=1, epochs=1, quiet=True, sweep={"lora.r": [4, 8]})
    >>> [ranks.points[name].table["local"]["parameters"] for name in ranks.points]
    [16384, 32768]

    Attributes:
        folder: Where everything is that the sweep has written.
        points: ``key=value``, several with commas → its comparison.
    """

    def __init__(self, content: Mapping[str, Any], base: Base, rows: Rows, place: _Place) -> None:
        self.folder = place.path
        self._content, self._place = content, place
        names = [point["name"] for point in content["points"]]
        self.points = {
            name: Comparison(read_json(self.folder / name / "comparison.json"), base, rows, place, name)
            for name in names
        }

    def to_pandas(self) -> pandas.DataFrame:
        """A line per point and method: the settings, then what ``sweep.csv`` has.

        Raises:
            UserError: pandas is not installed.
        """
        return _data_frame(sweep_lines(self._content))

    def to_markdown(self) -> str:
        """Methods × points on test rows and, where all clients have them, on validation rows."""
        return "\n".join(markdown(grid) for grid in grids(self._content))

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report over all points, one HTML file; ``report.html`` in the folder when no path is given."""
        return _copied(write_sweep_report(self.folder, self._content), path)

    def __repr__(self) -> str:
        return self.to_markdown()

    _repr_markdown_ = to_markdown


class Comparison(_InFolder):
    """Methods side by side. ``compare`` makes it.

    >>> import fedalt as fa
    >>> data = fa.load_data("tinyworld", clients=2, train_limit=8, test_limit=4)
    >>> table = fa.compare(data, "tiny-base", ["local", "fedit"], seeds=[0, 1], rounds=1, epochs=1, quiet=True)
    >>> table.to_pandas().groupby("method").score.mean().round().index.tolist()
    ['fedit', 'local']
    >>> sorted(table.runs)
    [('fedit', 0), ('fedit', 1), ('local', 0), ('local', 1)]

    Attributes:
        folder: Where everything is that the comparison has written.
        table: Method → mean, ``ci95`` (half of the 95 % interval over seeds, or draws), worst client, gain over Local,
            test against the reference with its verdict, steps, bytes, and more: the content of ``comparison.json``.
        finding: What came out, in one sentence.
    """

    def __init__(self, content: Mapping[str, Any], base: Base, rows: Rows, place: _Place, inside: str = "") -> None:
        self.folder = place.path / inside
        self.table: dict[str, dict[str, Any]] = content["methods"]
        self.finding = finding(content)
        self._content, self._base, self._rows, self._place = content, base, rows, place

    @cached_property
    def runs(self) -> dict[tuple[Any, ...], Run]:
        """(Method, seed) → its run; (method, seed, draw) where there are several draws of rows."""
        return {
            (name, *map(int, label.split("/"))): Run(Path(path), self._base, self._rows, self._place)
            for name, method in self.table.items()
            for label, path in zip(method["per_seed"], method["runs"], strict=True)
        }

    def to_pandas(self) -> pandas.DataFrame:
        """A line per method, seed and client: ``method, title, seed, client, task, metric, score, gain_over_local``.

        Raises:
            UserError: pandas is not installed.
        """
        return _data_frame(client_lines(self._content))

    def to_markdown(self) -> str:
        """Methods × tasks with average, difference to the reference and verdict; the best of each column in bold."""
        return markdown(score_grid(self._content))

    def to_latex(self, path: str | Path | None = None) -> str:
        """The same as a table for LaTeX with booktabs: the best of each column in bold, the second underlined.

        Args:
            path: Where it is written, too.
        """
        text = latex(score_grid(self._content))
        if path is not None:
            write_text(Path(path), text)
        return text

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report, one HTML file; ``report.html`` in the folder when no path is given."""
        return _copied(write_comparison_report(self.folder, self._content), path)

    def __repr__(self) -> str:
        return self.to_markdown()

    _repr_markdown_ = to_markdown


class Simulation(Rounds):
    """A run in memory, a round at a time, with everything open to be looked at; the numbers are those of ``run``.

    >>> import fedalt as fa
    >>> data = fa.load_data("tinyworld", clients=2, train_limit=8, test_limit=4)
    >>> sim = fa.Simulation(data, fa.load_base(), "fedit", epochs=1, lr=3e-3, seed=0)
    >>> for r in sim.rounds(2):
    ...     norm = sum(float(tensor.square().sum()) for tensor in r.uploads[0].values()) ** 0.5
    ...     print(r.number, sorted(r.losses), norm > 0, r.messages[1].share)
    1 [0, 1] True 0.5
    2 [0, 1] True 0.5
    >>> sim.score().metric
    'rouge1'

    All clients' adapters are in memory at a time; nothing is written. Arguments and errors are those of ``run``.
    """

    def __init__(
        self,
        data: Data | str | Path,
        base: Base | str | Path,
        method: Any = "fedalt",
        *,
        config: str | Path | RunConfig | None = None,
        settings: Mapping[str, Any] | None = None,
        **short: Any,
    ) -> None:
        data, base = _data(data), _base(base)
        wanted = {**_short("Simulation", short), **_dotted(settings), **_method(method)}
        full = _config(data, base, wanted, config, "ask")
        if full.federation.devices is not None:
            raise UserError("Simulation: federation.devices is for runs; this one is in one process")
        super().__init__(full, base.bases, data.rows)


# ------------------------------------------------------------------------------------------------------ what they share


def _data(data: Data | str | Path) -> Data:
    return data if isinstance(data, Data) else load_data(data)


def _base(base: Base | str | Path) -> Base:
    return base if isinstance(base, Base) else load_base(base)


def _method(method: Any) -> dict[str, Any]:
    """Dotted key → value of what names a method."""
    choice = as_variant(method)
    return {"method": choice.method, **choice.settings}


def _partition(partition: Partition | str | Path | None) -> dict[str, Any]:
    if partition is None or isinstance(partition, Partition):
        return partition.settings() if partition else {}
    key = "file" if str(partition).endswith(".json") else "by"
    return {f"data.partition.{key}": str(partition)}


def _short(function: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of keywords; those that are None are not given."""
    for name in given:
        if name in _ELSEWHERE:
            raise UserError(f"{function}: {name} is an argument of {_ELSEWHERE[name]}")
        if name not in KEYWORDS:
            raise UserError(
                f'{function}: no argument "{name}"{did_you_mean(name, KEYWORDS)}; there are {", ".join(KEYWORDS)}, and '
                'settings={"section.key": value} for everything else'
            )
    return {KEYWORDS[name]: value for name, value in given.items() if value is not None}


def _dotted(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Dotted key → value; a section that is a mapping is taken apart."""
    found: dict[str, Any] = {}
    for key, value in (settings or {}).items():
        inside = isinstance(value, Mapping) and key in RunConfig.model_fields
        found |= {f"{key}.{name}": one for name, one in value.items()} if inside else {key: value}
    for key in ("data.source", "model.name"):
        if key in found:
            raise UserError(f"settings: {key} is the first argument of load_{'data' if key[0] == 'd' else 'base'}")
    return found


def _config(
    data: Data, base: Base, wanted: Mapping[str, Any], config: str | Path | RunConfig | None, if_exists: IfExists
) -> RunConfig:
    """All settings: those of ``config``, of the rows, of the base, and what is wanted, the later ones first."""
    values = {**data.settings, **base.settings, **wanted}
    if isinstance(config, RunConfig):
        return with_settings(config, values)
    return settings_of(None if config is None else Path(config), list(values.items()), if_exists)


def _if_exists(resume: bool, overwrite: bool) -> IfExists:
    if resume and overwrite:
        raise UserError("resume and overwrite exclude each other")
    return "resume" if resume else "overwrite" if overwrite else "ask"


class _Place:
    """A folder. A temporary one, where none is given, goes when nobody holds this object any more."""

    def __init__(self, out: str | Path | None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fedalt-run-") if out is None else out).expanduser()
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True) if out is None else None

    def close(self) -> None:
        """Remove a temporary folder now."""
        if self._remove:
            self._remove()


def _handed_on(data: Data, processes: bool) -> AbstractContextManager[None]:
    """Around what starts processes: they find rows that are in memory here."""
    return handed_on(data.rows.given if processes else None, str(data.settings.get("data.source")))


def _bar(rounds: int, quiet: bool) -> AbstractContextManager[Sink]:
    if quiet:
        return nullcontext(lambda event: None)
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    notebook = type(shell).__name__ == "ZMQInteractiveShell"
    return in_notebook(rounds) if notebook else on_terminal(Console(stderr=True), rounds)


def _data_frame(lines: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    with needs("pandas", "data frames"):
        import pandas
    return pandas.DataFrame(list(lines))


def _copied(written: Path, path: str | Path | None) -> Path:
    if path is None:
        return written
    target = Path(path).expanduser()
    write_text(target, written.read_text(encoding="utf-8"))
    return target
