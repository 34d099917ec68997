"""What both sides of ``evaluation`` agree on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fedalt.benchmarks.task import Spec
from fedalt.config import EvaluationConfig


def settings(spec: Spec) -> EvaluationConfig:
    """How answers are generated."""
    return EvaluationConfig(num_beams=spec.num_beams, max_new_tokens=spec.max_new_tokens)


def digests(answers: Sequence[Sequence[str]]) -> list[str]:
    """Eight hexadecimal digits for every answer of every client, in order."""
    return [hashlib.sha256(text.encode()).hexdigest()[:8] for mine in answers for text in mine]
