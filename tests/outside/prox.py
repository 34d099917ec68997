"""A method with a penalty, as somebody outside the package writes it."""

from pydantic import Field

from fedalt.config.section import Section
from fedalt.methods.base import Method, squared_distance


class Prox(Method):
    """min_w f_k(w) + strength/2 ‖w − w̄‖²."""

    title = "Prox"

    class Settings(Section):
        """Prox."""

        strength: float = Field(0.1, ge=0)

    def penalty(self, trained, start):
        """Half the strength times the squared distance."""
        return self.settings.strength / 2 * squared_distance(trained, start)
