"""FedIT: FedAvg on LoRA."""

from fedalt.methods.base import Method
from fedalt.registry import METHODS


@METHODS.register("fedit")
class FedIT(Method):
    """Every client trains one LoRA; the server averages A and B, each on its own, and everybody starts from the mean.

        Ā = Σ_k p_k A_k,   B̄ = Σ_k p_k B_k,   p_k = n_k / Σ_m n_m

    The mean of the factors is not the mean of the products. Zhang et al., ICASSP 2024 (Shepherd), arXiv 2305.05644.
    """

    title = "FedIT"
    source = "Zhang et al., arXiv 2305.05644"
