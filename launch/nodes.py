"""The nodes of a run: how many there may be, where they meet, and why they do not."""

import argparse
import math
import socket
import time
from dataclasses import dataclass

from data_shards import UserError
from data_shards.errors import LostError


@dataclass(frozen=True)
class Nodes:
    """How many there may be."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "Nodes":
        least, _, most = text.partition(":")
        try:
            nodes = cls(int(least), int(most or least))
        except ValueError:
            nodes = cls(0, 0)
        if not 0 < nodes.least <= nodes.most:
            raise UserError(f"--nodes {text}: give a number such as 4, or a range such as 2:4")
        return nodes

    def __str__(self) -> str:
        return f"{self.least}:{self.most}" if self.elastic else f"{self.least}"

    @property
    def counts(self) -> range:
        return range(self.least, self.most + 1)

    @property
    def elastic(self) -> bool:
        return self.least < self.most


def require_rendezvous(args: argparse.Namespace, nodes: Nodes) -> None:
    if not args.host:
        raise UserError(
            f"--nodes {args.nodes}: no node to meet at; give the first node's name or address to "
            "each node, as --host (PET_MASTER_ADDR in a pod)"
        )
    if not 0 <= args.node_rank < nodes.most:
        raise UserError(
            f"--node-rank {args.node_rank}: of {nodes.most} nodes the ranks are 0 to "
            f"{nodes.most - 1}, one each"
        )
    if args.node_rank == 0 and not nodes.elastic:
        _require_free(args.port)
    _await_name(args.host, args.port, args.patience)


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"port {port} of this node cannot be had ({error.strerror}): another program or "
                "an earlier start of this one has it; end that, or give all nodes another --port"
            ) from None


def _await_name(host: str, port: int, patience: float) -> None:
    """A pod's name is there only when the pod is."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.getaddrinfo(host, port)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LostError(
                    f"--host {host}: no such host after {patience:g} s ({error.strerror}); give "
                    "the name or address by which this node reaches the first one"
                ) from None
        time.sleep(min(1.0, patience))


def waiting(patience: float, number: int | None) -> dict[str, int]:
    """How torch's rendezvous waits for the other nodes: that of fixed nodes, of which this one has
    a number, or the one of nodes that may come again, whose own limits are 600 and 60 seconds."""
    seconds = max(1, math.ceil(patience))
    if number is not None:
        return {"timeout": seconds, "rank": number}
    return {"join_timeout": seconds, "read_timeout": seconds}


def apart(error: Exception, nodes: Nodes, patience: float, had_met: bool) -> str:
    """Why they are not together, in our words: torch has some only for the store's connection."""
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError

    if isinstance(error, RendezvousClosedError):
        return "the run has ended on the other nodes, or was given up there; their last lines say"
    if not had_met:
        why = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"the nodes did not meet within {patience:g} s ({why}); look whether all {nodes} were "
            "started, and whether this port is open between them"
        )
    if isinstance(error, RendezvousTimeoutError):
        return (
            f"the nodes had met, but after a loss fewer than {nodes.least} of them met again "
            f"within {patience:g} s; start the same command on all nodes: the run goes on from "
            "what was saved last"
        )
    return (
        "the nodes had met, but the first one, by which they find each other, is gone; look what "
        "became of it, and start the same command on all nodes: the run goes on from what was "
        "saved last"
    )
