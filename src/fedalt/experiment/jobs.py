"""The runs of a comparison in several processes, each with its own base in memory."""

from __future__ import annotations

from collections.abc import Sequence

from fedalt.experiment.events import Sink
from fedalt.experiment.folder import IfExists
from fedalt.experiment.members import Member
from fedalt.experiment.processes import Processes


def train_in_jobs(members: Sequence[Member], jobs: int, if_exists: IfExists, sink: Sink) -> None:
    """Train members in ``jobs`` processes; whoever has finished one is handed the next.

    Every process loads the base for itself and has its share of this process's threads. Events have ``job`` added. The
    first error ends all processes; their finished rounds are safe.

    Raises:
        UserError: As for a single run; or a process was killed, for lack of memory for example.
        RuntimeError: A process failed for another reason; its traceback is on stderr.
    """
    names = [f"job {number}" for number in range(min(jobs, len(members)))]
    waiting = list(reversed(members))
    with Processes("members", [{"if_exists": if_exists} for _ in names], names, "--jobs") as processes:
        for job in range(len(processes)):
            _next(processes, job, waiting)
        left = len(members)
        while left:
            job, event = processes.hear()
            sink({**event, "job": job})
            if event["event"] == "member_finished":
                left -= 1
                _next(processes, job, waiting)


def _next(processes: Processes, job: int, waiting: list[Member]) -> None:
    """Hand out the next member, or let a process end when there are no more."""
    if not waiting:
        processes.dismiss(job)
        return
    member = waiting.pop()
    processes.tell(job, member.to_json(), f"{member.name} seed {member.config.seed}")
