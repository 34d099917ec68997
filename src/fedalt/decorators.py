"""Names for things of one's own: ``@fedalt.method("name")`` and its kin; what has a name can be asked for by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fedalt.registry import AGGREGATORS, METHODS, METRICS, PARTITIONERS, SOURCES, TEMPLATES, TRACKERS, Registry

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

    Args:
        name: Letters, digits and underscores. Also the name of the YAML section that holds the method's settings.

    Raises:
        UserError: The name is taken, or is none.
    """
    return _named(METHODS, name)


def aggregator(name: str) -> Callable[[T], T]:
    """Give a way to make RoW LoRAs of uploads a name, for ``fedalt.rest_of_world_aggregator``.

    >>> import fedalt as fa
    >>> @fa.aggregator("nobody")
    ... def nobody(gathered, rank, settings):
    ...     return lambda client: {}
    >>> nobody.__name__
    'nobody'

    Args:
        name: Letters, digits and underscores.

    Raises:
        UserError: The name is taken, or is none.
    """
    return _named(AGGREGATORS, name)


def metric(name: str, **facts: Any) -> Callable[[T], T]:
    """Give a metric a name, for ``evaluation.metric``: a function, or a class that is called like one.

    >>> import fedalt as fa
    >>> @fa.metric("short", title="short answers", digits=2)
    ... def short(answer, reference):
    ...     return 100.0 * (len(answer) <= len(reference))
    >>> data = fa.load_data("tinyworld", clients=2, train_limit=4, test_limit=2)
    >>> sim = fa.Simulation(data, "tiny-base", "local", epochs=1, settings={"evaluation.metric": "short"})
    >>> sim.score().metric
    'short'

    Args:
        name: Letters, digits and underscores.
        facts: ``title``, ``corpus=True`` for a function of all answers of a client, ``higher_is_better``, ``digits``,
            ``unit``, ``task``; see ``fedalt.evaluation.metrics.Metric``.

    Raises:
        UserError: The name is taken, or is none, or a fact is unknown.
    """
    return _named(METRICS, name, **facts)


def partitioner(name: str, **facts: Any) -> Callable[[T], T]:
    """Give a way to deal rows to clients a name, for ``data.partition.by``.

    >>> import fedalt as fa, numpy as np
    >>> @fa.partitioner("halves")
    ... def halves(rows, clients, rng):
    ...     return np.array_split(rng.permutation(len(rows)), clients)
    >>> data = fa.load_data("tinyworld", clients=2, partition="halves", seed=0)
    >>> [len(rows.train) for rows in data.clients.values()]
    [1200, 1200]

    Args:
        name: Letters, digits and underscores.
        facts: ``uses``, the settings of ``data.partition`` that it looks at; see ``fedalt.data.partition``.

    Raises:
        UserError: The name is taken, or is none, or a fact is unknown.
    """
    return _named(PARTITIONERS, name, **facts)


def source(name: str) -> Callable[[T], T]:
    """Give a reader of rows a name, for ``data.source``.

    >>> import fedalt as fa
    >>> fa.source("my rows")
    Traceback (most recent call last):
    fedalt.errors.UserError: source "my rows": a name has letters, digits and underscores, and starts with a letter

    Args:
        name: Letters, digits and underscores.

    Raises:
        UserError: The name is taken, or is none.
    """
    return _named(SOURCES, name)


def template(name: str) -> Callable[[T], T]:
    """Give a prompt template a name, for ``data.template``.

    >>> import fedalt as fa
    >>> fa.template("my text")
    Traceback (most recent call last):
    fedalt.errors.UserError: template "my text": a name has letters, digits and underscores, and starts with a letter

    Args:
        name: Letters, digits and underscores.

    Raises:
        UserError: The name is taken, or is none.
    """
    return _named(TEMPLATES, name)


def tracker(name: str) -> Callable[[T], T]:
    """Give a place where a run's numbers go a name, for ``report.trackers``.

    >>> import fedalt as fa
    >>> fa.tracker("my board")
    Traceback (most recent call last):
    fedalt.errors.UserError: tracker "my board": a name has letters, digits and underscores, and starts with a letter

    Args:
        name: Letters, digits and underscores.

    Raises:
        UserError: The name is taken, or is none.
    """
    return _named(TRACKERS, name)


def _named(registry: Registry[Any], name: str, **facts: Any) -> Callable[[T], T]:
    return registry.register(name, **facts)
