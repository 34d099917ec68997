"""The settings that are a site's own, and its rows: of the whole federation it sees one client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedalt.config import RunConfig, parse_received, with_settings
from fedalt.data.load import elsewhere, load_as_it_is, load_federation
from fedalt.data.rows import Federation
from fedalt.errors import UserError


@dataclass(frozen=True)
class SiteRows:
    """What a site says for itself; whatever it leaves out is as in the run's settings.

    Attributes:
        data: Its rows, in any form that ``data.source`` takes.
        model: Where its copy of the base model is.
        device: Where it trains.
    """

    data: str | None = None
    model: str | None = None
    device: str | None = None

    def load(self, settings: dict[str, Any], client: int) -> tuple[RunConfig, Federation]:
        """The run's settings as they hold here, and this client's rows alone.

        A source of the site's own with one client is that client, whatever its number; one with more must have this
        client among them. Tables and other sources without clients are all this client's.

        Raises:
            UserError: As for a run on one machine; or this client is not in the source.
        """
        config = parse_received(settings, "the server's settings")
        own = {"model.name": self.model, "model.device": self.device}
        config = with_settings(config, {key: value for key, value in own.items() if value is not None})
        if self.data is None:
            federation = load_federation(config.data, config.seed)
        else:
            config = config.model_copy(update={"data": elsewhere(config.data, self.data)})
            federation = load_as_it_is(config.data, config.seed)
        mine = federation.clients.get(client)
        if self.data is not None and len(federation.clients) == 1:
            [mine] = federation.clients.values()
        if mine is None:
            raise UserError(f"{config.data.source}: client {client} is not among clients {list(federation.ids)}")
        return config, Federation({client: mine}, federation.source, federation.notes)
