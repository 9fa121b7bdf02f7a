"""Cards and networks as their makers state them, and the shares of that one gets in practice."""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One GPU by its data sheet."""

    name: str
    memory: float  # bytes
    peak_flops: float  # dense bfloat16, a second
    link_bytes: float  # to the other cards of its node, bytes a second and direction


# From the makers' data sheets; dense rates, without sparsity.
CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        Card("a100-40", 40e9, 312e12, 300e9),
        Card("a100-80", 80e9, 312e12, 300e9),
        Card("l40s", 48e9, 362e12, 32e9),
        Card("h100", 80e9, 989e12, 450e9),
        Card("h200", 141e9, 989e12, 450e9),
        Card("b200", 192e9, 2250e12, 900e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """The cards a run gets, and what is assumed about them."""

    card: Card
    gpus: int
    gpus_per_node: int = 8
    network_gbit: float = 400.0  # a second and card, between nodes
    compute_share: float = 0.40  # of the peak that kernels reach; assumed until calibrated
    network_share: float = 0.75  # of the line rate that collectives reach; assumed
    gpu_hours_to_failure: float = 50_000.0
    disk_bytes: float = 2e9  # a second and node, of the shared file system; assumed

    @property
    def nodes(self) -> int:
        """Nodes, the last one perhaps not full."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def bus_bytes(self) -> float:
        """Bytes a second that a ring over all cards moves through each of them."""
        if self.gpus <= self.gpus_per_node:
            return self.card.link_bytes * self.network_share
        return self.network_gbit / 8 * 1e9 * self.network_share

    @property
    def failure_seconds(self) -> float:
        """Mean seconds between failures of the run.

        419 unexpected interruptions in 54 days on 16,384 cards (Llama 3, arXiv 2407.21783, table
        5) are one in 50,000 card hours.
        """
        return self.gpu_hours_to_failure * 3600 / self.gpus
