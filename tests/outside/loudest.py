"""An aggregator: the RoW LoRA of a client is the one upload of the others with the largest product."""

from fedalt.methods.algebra import norm
from fedalt.names import INDIVIDUAL, REST_OF_WORLD, A, B, Key
from fedalt.registry import AGGREGATORS


@AGGREGATORS.register("loudest")
def loudest(gathered, rank, settings):
    """Read every upload once, and answer for any client."""
    layers = gathered.factors(INDIVIDUAL)
    sizes = {c: sum(norm(*mine[c]) for mine in layers.values()) for c in gathered.weights}

    def row(client):
        chosen = max((c for c in sizes if c != client), key=sizes.__getitem__)
        return {Key(m, REST_OF_WORLD, f): mine[chosen][i] for m, mine in layers.items() for i, f in enumerate((A, B))}

    return row
