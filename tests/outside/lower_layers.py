"""A method that shares the adapters of the lower layers and keeps those of the upper ones, in a file of its own."""

from fedalt.config.section import Section
from fedalt.methods.base import Method
from fedalt.registry import METHODS


@METHODS.register("lower_layers")
class LowerLayers(Method):
    """FedAvg on the first adapted layers."""

    title = "Lower layers"

    class Settings(Section):
        """Lower layers."""

        part: float = 0.5

    def setup(self):
        """The layers in the order of the model."""
        self.lower = set(list(self.layers)[: round(self.settings.part * len(self.layers))])

    def shares(self, key):
        """Only theirs."""
        return super().shares(key) and key.module in self.lower
