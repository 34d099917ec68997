"""What server and site say to each other: a header of strict JSON, and a block of tensors.

Every field has a type and a bound, and nothing else is read or sent: these classes are the list of what leaves a site.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from fedalt.errors import UserError, shortened

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
LONGEST = 8_000_000
"""Characters of a header, at most: the shapes of a hundred thousand tensors."""
Do = Literal["who", "join", "train", "offer", "mask", "open", "score", "save"]
Count = Annotated[int, Field(ge=0, le=10**12)]
Number = Annotated[int, Field(ge=0, le=10**7)]
"""Of a client or a round."""
Dimension = Annotated[int, Field(ge=1, le=2**31)]
Finite = Annotated[float, Field(ge=-1e12, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=255)]
"""Of a run, which is a folder's at the sites."""
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]*$", max_length=64)]
Secret = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]*$", max_length=300)]
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=64)]
Path = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", min_length=1, max_length=300)]
"""Of a module in the base model."""

CODES = {
    "settings": "refuses these settings",
    "path": "refused: settings from a server name no path and no file of a site; it gives --data and --model itself",
    "pooled": "refused: this method trains on everybody's rows in one place; here rows stay at their sites",
    "planted": "refused: data.canaries plants made-up rows; a site trains on its own",
    "two": "refused: with two clients each one has the LoRA that the other shares; a site that agrees is started with "
    "--allow-two",
    "allow_two": "refused: flower.allow_two lets a client be told what is made of one other upload alone; a site that "
    "agrees is started with --allow-two",
    "mixer": "refused: these settings would upload this site's mixer; a site that agrees is started with --share mixer",
    "heads": "refused: these settings would upload this site's heads; a site that agrees is started with --share heads",
    "rows": "cannot use its rows with these settings",
    "labels": "has {count} rows with labels that model.labels does not name",
    "client": "its rows have {count} clients, and not this one; a source of one client is any client's",
    "few_rows": "has {count} rows, fewer than its own least number",
    "model": "cannot use its base model with these settings",
    "changed": "refused: this site's base model, shapes, method or version are no longer those with which it joined; "
    "start it as it was",
    "message": "was sent what does not fit this run",
    "single": "refused: it takes part only where the server sees no single upload; set federation.secure=true",
    "peers": "has no keys of its own and of the other sites, which a secure sum needs: client_N.pub beside its --key",
    "sum": "takes no part in this secure sum; its own log says why",
    "state": "its state is of another run or damaged",
    "round": "asked for a round that is over, round {count} is done",
    "apart": "holds the upload of round {count}, and not the one that counts",
    "budget": "its privacy budget is spent",
    "epsilon": "refused: it takes part only with a privacy.epsilon of at most its own, a privacy.delta of at most "
    "1/rows, and without privacy.report=all",
    "unreported": "privacy.report=none lets no score out",
    "sent_before": "has sent round {count} and lost it since; to go on would spend more than is counted",
    "not_finite": "its loss or adapter is not finite after training",
    "disk": "cannot write its state: disk full, or not permitted",
    "memory": "out of memory",
    "training": "cannot train",
    "scoring": "cannot be scored",
    "trainer": "its trainer does not answer",
    "failed": "failed",
}
"""Why a site does not do what it is asked, and what the server makes of it. The full text stays in the site's log."""


def _known(code: str) -> str:
    if code not in CODES:
        raise ValueError("unknown")
    return code


class SiteError(UserError):
    """What a site cannot or will not do: a line for its own log, and a code with a count for the server."""

    def __init__(self, code: str, line: str = "", count: int = 0) -> None:
        super().__init__(line or CODES[code].format(count=count))
        self.code, self.count = code, count


@dataclass(frozen=True)
class Common:
    """What all sites of a run have in common.

    Attributes:
        base: Fingerprint of the frozen base's weights.
        method: Fingerprint of the method and its settings; see ``rule_of``.
        layers: Path of every adapted layer and its (d_in, d_out).
        code: What of the settings is in a file of the site's own, and the file's digest.
    """

    __pydantic_config__ = STRICT
    base: Digest
    shapes: Annotated[tuple[tuple[Path, tuple[Dimension, ...]], ...], Field(max_length=100_000)]
    shared: Count
    trainable: Count
    fedalt: Text
    method: Digest
    layers: Annotated[tuple[tuple[Path, tuple[Dimension, Dimension]], ...], Field(max_length=100_000)] = ()
    code: Annotated[tuple[tuple[Path, Digest], ...], Field(max_length=100)] = ()

    @property
    def layer_sizes(self) -> dict[str, tuple[int, int]]:
        """Path of every adapted layer → (d_in, d_out)."""
        return dict(self.layers)

    @property
    def digest(self) -> str:
        """All of it in a word, which every later request carries."""
        return hashlib.sha256(_adapter(Common).dump_json(self)).hexdigest()[:16]

    def differs(self, other: Common) -> str:
        """In what this is unlike another, in words; nothing where they are equal."""
        if self.base != other.base:
            return f"its base model is {self.base[:12]}, this run's is {other.base[:12]}"
        if self.fedalt != other.fedalt:
            return f"it has fedalt {self.fedalt}, this run {other.fedalt}"
        theirs = dict(other.code)
        for name, digest in self.code:
            if theirs.get(name) != digest:
                return (
                    f"its file with {shortened(name)} is {digest[:12]}, this run's is {theirs.get(name, 'none')[:12]}"
                )
        odd = next((mine for mine, others in zip(self.shapes, other.shapes, strict=False) if mine != others), None)
        if odd or len(self.shapes) != len(other.shapes):
            return f"its uploads would have other shapes than this run's ({shortened(str(odd or len(self.shapes)))})"
        if self.method != other.method:
            return f"its method and settings are {self.method[:12]}, this run's are {other.method[:12]}"
        return "" if self == other else "its adapters are of another size"


@dataclass(frozen=True)
class Member:
    """A site that takes part.

    Attributes:
        task: Name of its task; its client's number unless the site gives one.
        holds: Round of its last upload, 0 for none.
        skipped: Rows that do not fit under the cut-off.
    """

    __pydantic_config__ = STRICT
    samples: Annotated[int, Field(ge=1, le=10**9)]
    task: Text
    holds: Number
    common: Common
    skipped: Count = 0


@dataclass(frozen=True)
class Trained:
    """A finished round, as ``TrainingStats`` has it.

    Attributes:
        holds: Round of its last upload, 0 for none.
        cut: Numbers of the upload that a secure sum has no room for.
        epsilon: What it has spent so far, where steps are private.
    """

    __pydantic_config__ = STRICT
    loss: Finite | None
    steps: Count
    tokens: Count
    alpha: Annotated[tuple[Finite, ...], Field(max_length=100_000)]
    holds: Number
    cut: Count = 0
    epsilon: Finite | None = None


@dataclass(frozen=True)
class Offer:
    """What a site offers for one attempt at a secure sum; see ``masks.py``.

    Attributes:
        client: Who offers.
        weight: Its weight in the sum.
        key: X25519 public key.
        signature: By the key of the site, over all of it and the attempt.
    """

    __pydantic_config__ = STRICT
    client: Number
    weight: Annotated[int, Field(ge=1, le=10**9)]
    key: Secret
    signature: Signature


@dataclass(frozen=True)
class Opened:
    """What takes a site's own mask from the sum.

    Attributes:
        seed: Of the mask.
    """

    __pydantic_config__ = STRICT
    seed: Secret


@dataclass(frozen=True)
class Part:
    """Scores of some rows."""

    __pydantic_config__ = STRICT
    rows: Annotated[int, Field(ge=1, le=10**9)]
    metrics: Annotated[dict[Text, Finite], Field(min_length=1, max_length=100)]


@dataclass(frozen=True)
class Scores(Part):
    """Scores of a client.

    Attributes:
        categories: The same for those categories of rows that the site has named.
        rouge_tokenizer: How ROUGE counts words, by the script of most references.
    """

    categories: Annotated[dict[Text, Part], Field(max_length=1000)] = field(default_factory=dict)
    rouge_tokenizer: Path | None = None


@dataclass(frozen=True)
class Scored:
    """Scores on the site's own rows.

    Attributes:
        after: With the server's aggregate installed.
        before: As the client left training.
        validation: On validation rows, with the aggregate.
        row_lora_drift: How far the aggregate has moved.
    """

    __pydantic_config__ = STRICT
    after: Scores
    before: Scores | None
    validation: Scores | None
    row_lora_drift: Finite | None


class Frame:
    """What goes over the wire."""

    block: bytes

    @property
    def header(self) -> str:
        """Everything but the block, as JSON."""
        kind: Any = type(self)
        return _adapter(kind).dump_json(self, exclude=_ASIDE).decode()

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return len(self.header.encode()) + len(self.block)

    @classmethod
    def parse(cls, header: str, block: bytes) -> Self:
        """Invert ``header``."""
        return replace(strict(cls, header), block=block)  # type: ignore[type-var]


@dataclass(frozen=True)
class Request(Frame):
    """What the server asks of a site.

    Attributes:
        do: ``who`` are you; ``join`` the run; ``train`` a round; ``offer``, ``mask`` and ``open`` what you trained in
            it; ``score`` or ``save`` your model as it would start the next round.
        run: Identifies the run, anew for every start but a resumption; of ``who``, the question.
        round: The round to train, or the last finished one.
        common: Digest of what all sites of the run have in common, for a site that has joined.
        counts: The round of the client's upload in what it is told, 0 for none.
        share: The client's weight in what it is told; see ``Message``.
        told: Whether it is told anything; the tensors are in ``block``.
        attempt: Number of an attempt at a secure sum.
        offers: What is offered for it by all who take part.
        block: See ``wire.py``.
    """

    __pydantic_config__ = STRICT
    do: Do
    run: Name = "0"
    settings: Annotated[str, Field(max_length=1_000_000)] = "{}"
    clients: Annotated[int, Field(ge=0, le=100_000)] = 0
    round: Number = 0
    common: Digest = ""
    counts: Number = 0
    share: Share = 0.0
    told: bool = False
    attempt: Number = 0
    offers: Annotated[tuple[Offer, ...], Field(max_length=10_000)] = ()
    block: bytes = b""


_BODIES: dict[str, Any] = {"join": Member, "train": Trained, "offer": Offer, "open": Opened, "score": Scored}


@dataclass(frozen=True)
class Reply(Frame):
    """What a site answers.

    Attributes:
        client: Whose answer this is.
        attempt: The attempt at a secure sum.
        body: What was asked for; None for ``who``, ``mask`` and ``save``, and with an error.
        error: Why there is no answer: one of ``CODES``.
        count: A number that belongs to the error.
        block: An upload, see ``wire.py``, or a masked one, see ``masks.py``.
        unfit: At the server, never sent: what is wrong with it.
    """

    __pydantic_config__ = STRICT
    do: Do
    run: Name
    round: Number
    client: Number
    attempt: Number = 0
    body: Member | Trained | Offer | Opened | Scored | None = None
    error: Annotated[str, AfterValidator(_known)] | None = None
    count: Count = 0
    block: bytes = b""
    unfit: str = ""

    @staticmethod
    def to(request: Request, client: int, **said: Any) -> Reply:
        """A reply to a request."""
        return Reply(request.do, request.run, request.round, client, request.attempt, **said)

    @staticmethod
    def failed(request: Request, client: int, error: Exception) -> Reply:
        """What leaves a site of an error: its code and a count."""
        if isinstance(error, SiteError):
            return Reply.to(request, client, error=error.code, count=error.count)
        memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        return Reply.to(request, client, error="memory" if memory else "failed")

    @property
    def why(self) -> str:
        """Why there is no answer; nothing where there is one."""
        return self.unfit or (CODES[self.error].format(count=self.count) if self.error else "")

    def check(self, request: Request, client: int) -> None:
        """Refuse what is no answer of this client to this request."""
        asked = (request.run, request.round, request.do, request.attempt)
        if (self.run, self.round, self.do, self.attempt) != asked:
            raise UserError(
                f"answer to {self.do}, round {self.round} of {shortened(self.run)}, not to {request.do}, round "
                f"{request.round} of {request.run}"
            )
        if self.client != client:
            raise UserError(f"the answer is client {self.client}'s, not client {client}'s")
        wanted = type(None) if self.error else _BODIES.get(self.do, type(None))
        if type(self.body) is not wanted or (self.block and (self.error or self.do not in ("train", "mask"))):
            raise UserError("the answer does not hold what was asked for")


_ASIDE = {"block", "unfit"}
T = TypeVar("T")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def strict(kind: Callable[..., T], text: str) -> T:
    """A value of a dataclass from JSON that has exactly its fields, each once."""
    if len(text) > LONGEST:
        raise UserError(f"a header of {len(text):,} characters")
    try:
        raw = json.loads(text, object_pairs_hook=once)
        names = {each.name for each in fields(kind)} - _ASIDE  # type: ignore[arg-type]
        if not isinstance(raw, dict) or raw.keys() != names:
            raise ValueError("it has other fields than it must have")
        value: T = _adapter(kind).validate_json(text)
        return value
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = shortened(".".join(map(str, first["loc"])), 100)
        raise UserError(f"not what it must be ({place}: {shortened(first['msg'], 100)})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not what it must be ({shortened(str(error), 100)})") from None


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON mapping, which may have a name once only."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field twice")
    return found
