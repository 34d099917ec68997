"""Names for things of one's own: ``@fedalt.method("name")`` and its kin; what has a name can be asked for by it.

A name has letters, digits and underscores. One that is taken, and an attribute that is unknown, is a ``UserError``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fedalt.registry import AGGREGATORS, METHODS, METRICS, PARTITIONERS, SOURCES, TEMPLATES, TRACKERS

T = TypeVar("T")


def method(name: str) -> Callable[[T], T]:
    """Give a method a name: a class derived from ``fedalt.Method``.

    >>> import fedalt as fa
    >>> @fa.method("pulled")
    ... class Pulled(fa.Method):
    ...     '''min_w f_k(w) + μ/2 ‖w − w̄‖²'''
    ...     class Settings(fa.Settings):
    ...         mu: float = 0.01
    ...     def penalty(self, trained, start):
    ...         return self.settings.mu / 2 * fa.squared_distance(trained, start)
    >>> data = fa.load_data("tinyworld", clients=2, train_limit=4, test_limit=2)
    >>> sim = fa.Simulation(data, "tiny-base", Pulled(mu=0.5), epochs=1, seed=0)
    >>> [r.number for r in sim.rounds(1)]
    [1]

    The name is also that of the YAML section with the method's settings.
    """
    return METHODS.register(name)


def aggregator(name: str) -> Callable[[T], T]:
    """Give a way to make RoW LoRAs of uploads a name, for ``fedalt.rest_of_world_aggregator``.

    >>> import fedalt as fa
    >>> @fa.aggregator("nobody")
    ... def nobody(gathered, rank, settings):
    ...     return lambda client: {}
    >>> nobody.__name__
    'nobody'
    """
    return AGGREGATORS.register(name)


def metric(name: str, **attributes: Any) -> Callable[[T], T]:
    """Give a metric a name, for ``evaluation.metric``: a function of one answer and its reference, or of all of them.

    >>> import fedalt as fa
    >>> @fa.metric("length_apart", higher_is_better=False)
    ... def length_apart(answer: str, reference: str) -> float:
    ...     return abs(len(answer) - len(reference))
    >>> @fa.metric("word_variety", corpus=True, digits=3)
    ... def word_variety(answers: list[str], references: list[str]) -> float:
    ...     words = " ".join(answers).split()
    ...     return len(set(words)) / max(1, len(words))
    >>> data = fa.load_data("tinyworld", clients=2, train_limit=4, test_limit=2)
    >>> sim = fa.Simulation(data, "tiny-base", epochs=1, seed=0, settings={"evaluation.metrics": ["word_variety"]})
    >>> "word_variety" in sim.score().details[0]
    True

    Args:
        name: Its name.
        attributes: ``title`` in tables; ``corpus`` for a function of all rows of a client; ``task`` (``text`` or
            ``class``) where it suits one alone; ``higher_is_better``, ``points`` for 0 to 100, ``unit``, ``digits``;
            ``reads`` for what is compared with the reference, if not the answer.
    """
    return METRICS.register(name, **attributes)


def partitioner(name: str, **attributes: Any) -> Callable[[T], T]:
    """Give a way to deal rows to clients a name, for ``data.partition.by``: a function of rows, clients, generator.

    >>> import fedalt as fa
    >>> import numpy as np
    >>> @fa.partitioner("evenly")
    ... def evenly(rows, clients, rng):
    ...     return np.array_split(rng.permutation(len(rows)), clients)
    >>> data = fa.load_data("tinyworld", clients=4, partition="evenly", seed=0)
    >>> [len(rows.train) for rows in data.clients.values()]
    [600, 600, 600, 600]

    ``rows.labels`` and ``rows.categories`` say what there is; the places of every client's rows are returned.

    Args:
        name: Its name.
        attributes: ``uses``, the settings of ``data.partition`` that matter to it; ``fixed`` if the generator does not
            decide how many rows a client gets.
    """
    return PARTITIONERS.register(name, **attributes)


def source(name: str) -> Callable[[T], T]:
    """Give a reader of rows a name, for ``data.source``: a function that returns what ``fedalt.load_data`` takes.

    >>> import fedalt as fa
    >>> @fa.source("additions")
    ... def additions():
    ...     rows = [{"instruction": f"{i} + 1 =", "output": str(i + 1)} for i in range(20)]
    ...     return {"anna": (rows[:8], rows[8:10]), "ben": (rows[10:18], rows[18:])}
    >>> [len(rows.train) for rows in fa.load_data("additions").clients.values()]
    [8, 8]
    """
    return SOURCES.register(name)


def template(name: str) -> Callable[[T], T]:
    """Give a prompt template a name, for ``data.template``: a function from an instruction to a prompt.

    >>> import fedalt as fa
    >>> @fa.template("asked")
    ... def asked(instruction: str) -> str:
    ...     return f"Q: {instruction}" + chr(10) + "A: "
    >>> asked("Why?").splitlines()
    ['Q: Why?', 'A: ']
    """
    return TEMPLATES.register(name)


def tracker(name: str) -> Callable[[T], T]:
    """Give a place where a run's numbers go a name, for ``report.trackers``: a class with start, log and finish.

    >>> import fedalt as fa
    >>> @fa.tracker("plain_lines")
    ... class PlainLines:
    ...     def start(self, run, about, folder):
    ...         folder.mkdir(parents=True)
    ...         self.file = (folder / "numbers.txt").open("w")
    ...     def log(self, values, step):
    ...         print(step, values, file=self.file)
    ...     def finish(self):
    ...         self.file.close()
    """
    return TRACKERS.register(name)
