"""A run's personal models on tasks of lm-evaluation-harness, as they are: with mixers, without a merge."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedalt.errors import UserError, first_line, needs
from fedalt.evaluation.prompt_similarity import load_to_answer
from fedalt.personal.rescore import clients_of
from fedalt.runs.client_folder import read_client
from fedalt.runs.folder import Which, finished_run
from fedalt.runs.setup import load_resident


def harness(
    run: Path, client: int | None, tasks: Sequence[str], which: Which | None = None
) -> dict[int, dict[str, dict[str, Any]]]:
    """Client → task → what the harness says of it; tasks are names, or YAML files that describe one."""
    with needs("harness", "tasks of lm-evaluation-harness"):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    folder, config = finished_run(run)
    if config.classifies:
        raise UserError(f"{run}: this run classifies; the harness asks models that write")
    clients = clients_of(folder, client)
    resident = load_resident(config)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known = TaskManager(include_defaults=not all(Path(task).is_file() for task in tasks))  # thousands of files
    found = {}
    for one in clients:
        personal = read_client(folder, one, resident.base, which)
        if personal.placement.mixing.kind == "instance":
            raise UserError(
                f"{run}: {config.method} weighs its LoRAs by prompt; export --merge and call lm_eval on that"
            )
        load_to_answer(resident.model, [personal.state], [[]], personal.placement)
        model = HFLM(pretrained=resident.base.model, tokenizer=resident.base.tokenizer, batch_size=8)
        try:
            results: Any = simple_evaluate(model, tasks=list(tasks), task_manager=known, log_samples=False)
        except Exception as error:  # whatever a task and its data set make the libraries raise
            raise UserError(f"--lm-eval: {','.join(tasks)} cannot be asked ({first_line(error)})") from None
        found[one] = results["results"]
    return found
