"""A run from settings to report, for whoever starts one: the command line and the Python API."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from fedalt.config import RunConfig
from fedalt.data.load import Rows
from fedalt.methods.registry import configured
from fedalt.report.html import write_report
from fedalt.report.insights import look
from fedalt.runs.devices import check_devices
from fedalt.runs.events import Sink
from fedalt.runs.folder import IfExists, RunFolder, check_folder, claim_folder
from fedalt.runs.rounds import run
from fedalt.runs.setup import Bases, Experiment, load_rows, prepare
from fedalt.runs.trackers import check_trackers, tracked
from fedalt.runtime import forget_peak_memory


def run_one(
    config: RunConfig,
    if_exists: IfExists,
    bar: AbstractContextManager[Sink],
    bases: Bases | None = None,
    rows: Rows | None = None,
) -> tuple[Experiment, RunFolder, dict[str, Any]]:
    """Check everything, train, score, save every client's model, write the report.

    Returns:
        The experiment, its folder, and the content of ``final_scores.json``.
    """
    check_trackers(config.report.trackers)
    check_devices(config)
    check_folder(config.folder, if_exists)
    forget_peak_memory()
    bases, rows = bases or Bases(), rows or Rows()
    config, federation = load_rows(configured(config, config.method), rows)
    experiment = prepare(config, bases.of(config), federation, rows=rows)
    folder = claim_folder(config.folder, if_exists)
    with bar as show, tracked(config.report.trackers, folder.path, show, config.report) as sink:
        scores = run(experiment, folder, sink)
    look(folder, config.report.insight, experiment.resident, rows)
    write_report(folder)
    return experiment, folder, scores
