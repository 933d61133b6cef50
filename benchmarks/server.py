"""What the server of FedALT does for a client, against how many clients there are.

    python benchmarks/server.py --write    # 8, 64, 512 and 4096 clients of 4 million numbers each

For each client: `aggregate` puts its new upload in the place of its last one in the total, and
`rest_of_world` takes its own from the total again. Uploads are the same 8 trees in turn, so that
the memory of the machine sets no limit. Beside it, up to 64 clients, the mean of all the others
formed anew for each client, as the method is usually written. `of copy` is the bandwidth as a share
of that of a plain copy of 256 MiB; what must be read and written is, in `aggregate`, the old and
the new upload, and twice the total; in `rest_of_world` the total, the own adapter and the result.
`clone` is the own adapter copied to memory that was not there before, as the result's is not.

The second table is of FedALT-select's server in a round in which everybody has trained: the
similarities of all pairs, and each client's sum of its kin, who come in groups of four. All of a
group count alike or, where it says `unlike`, each client counts its kin a little differently. The
adapters of all clients are in memory, so they have an eighth of the sites, and what is measured is
multiplied by eight: both times grow with the number of sites.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from document import table, write

from fedalt.core.tree import Name, Tree, apply, copy
from fedalt.methods.contract import Message
from fedalt.methods.fedalt import INDIVIDUAL, FedALT, Server, rest_of_world
from fedalt.methods.kin import similarities
from fedalt.methods.kin_sums import sums_of_products

SITES, RANK, WIDTH = 64, 8, 4096  # 64 x 2 x 8 x 4096 = 4.2 million numbers
FEWER = 8  # sites of FedALT-select's clients
GROUP = 4  # clients that are alike
NUMBERS = SITES * 2 * RANK * WIDTH
DIFFERENT = 8


@dataclass(frozen=True)
class Same:
    """A ledger of as many clients as one likes, which holds the same few uploads."""

    uploads: list[Message]
    count: int

    def __contains__(self, client_id: object) -> bool:
        return int(str(client_id)) < self.count

    def __getitem__(self, client_id: str) -> Message:
        return self.uploads[int(client_id) % DIFFERENT]

    def clients(self) -> list[str]:
        """All of them."""
        return [str(client) for client in range(self.count)]

    def put(self, client_id: str, message: Message) -> "Same":  # noqa: ARG002 - a ledger's
        """As it was."""
        return self

    def without(self, client_id: str) -> "Same":  # noqa: ARG002 - a ledger's
        """As it was."""
        return self


def uploads() -> list[Message]:
    """Random adapters."""
    stream = torch.Generator().manual_seed(0)

    def tree() -> Tree:
        shapes = {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}
        return {
            Name(f"site.{site}", INDIVIDUAL, factor): torch.randn(shape, generator=stream)
            for site in range(SITES)
            for factor, shape in shapes.items()
        }

    return [Message(tree(), {"weight": 1.0}) for _ in range(DIFFERENT)]


def seconds(work: Callable[[], object], times: int = 5) -> float:
    """The median time of some work, after once to warm up."""
    work()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def copied() -> float:
    """Bytes a second that are read and written by a copy."""
    source = torch.ones(2**26)
    target = torch.zeros(2**26)
    return 2**29 / seconds(lambda: target.copy_(source))


def measure(clients: int, given: list[Message]) -> dict[str, float]:
    """Milliseconds for a client."""
    method = FedALT()
    latest = Same(given, clients)
    server = method.aggregate(Server(), ((str(c), given[c % DIFFERENT]) for c in range(8)))
    server = Server(server.total, float(clients), clients, latest)
    # One client more or less is what it costs: the first copy of the total is everybody's.
    few = [(str(c), given[(c + 1) % DIFFERENT]) for c in range(clients)]
    aggregate = seconds(lambda: method.aggregate(server, iter(few)), 3) / clients
    message = method.broadcast(server, "0")
    row = seconds(lambda: rest_of_world(given[0].tree, 1.0, message))
    clone = seconds(lambda: copy(given[0].tree))
    rate = copied()
    result = {
        "clients": clients,
        "aggregate, ms": aggregate * 1e3,
        "rest of world, ms": row * 1e3,
        "aggregate, of copy": (4 + 4 + 4 * 8) * NUMBERS / aggregate / rate,
        "rest of world, of copy": (8 + 4 + 4) * NUMBERS / row / rate,
        "clone, of copy": (4 + 4) * NUMBERS / clone / rate,
    }
    if clients <= 64:
        trees = [given[c % DIFFERENT].tree for c in range(1, clients)]

        def stacked() -> Tree:
            return {name: torch.stack([tree[name] for tree in trees]).mean(0) for name in trees[0]}

        anew = seconds(stacked, 3)
        result |= {"anew, ms": anew * 1e3, "anew / ours": anew / (aggregate + row)}
    return {name: round(value, 2) for name, value in result.items()}


def measure_kin(clients: int) -> dict[str, float]:
    """Milliseconds for a client of FedALT-select, were its sites as many as FedALT's."""
    stream, groups = torch.Generator().manual_seed(0), uploads()
    adapters: dict[str, Tree] = {}
    for number in range(clients):
        like = groups[number // GROUP % DIFFERENT].tree
        few = {name: like[name] for name in like if int(name.site.split(".")[1]) < FEWER}
        adapters[f"{number:04}"] = apply(
            lambda tensor: tensor + torch.randn(tensor.shape, generator=stream), few
        )
    names, share = list(adapters), 1 / GROUP
    kin = {}
    for at, client in enumerate(names):
        first = at - at % GROUP
        kin[client] = dict.fromkeys(names[first : first + GROUP], share)
    unlike = {client: {**of, client: 0.3 + at / 1e4} for at, (client, of) in enumerate(kin.items())}
    of_each = SITES / FEWER / clients * 1e3
    result = {
        "clients": clients,
        "similarities, ms": of_each * seconds(lambda: similarities(adapters), 3),
        "sums, ms": of_each * seconds(lambda: sums_of_products(adapters, kin, "row", RANK), 3),
        "sums, unlike, ms": of_each
        * seconds(lambda: sums_of_products(adapters, unlike, "row", RANK), 3),
    }
    result["a round, s"] = clients * (result["similarities, ms"] + result["sums, unlike, ms"]) / 1e3
    return {name: round(value, 2) for name, value in result.items()}


def main() -> None:
    """A line for each number of clients."""
    given, rows = uploads(), []
    for count in [int(each) for each in sys.argv[1:] if each != "--write"] or [8, 64, 512, 4096]:
        rows.append(measure(count, given))
        print(json.dumps(rows[-1]), flush=True)
    kin = []
    for count in (8, 64, 512):
        kin.append(measure_kin(count))
        print(json.dumps(kin[-1]), flush=True)
    if "--write" in sys.argv:
        write("server", f"{table(rows)}\n\n{table(kin)}")


if __name__ == "__main__":
    main()
