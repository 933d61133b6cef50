"""What a secure sum costs a client and the server, against how many clients there are.

    python benchmarks/secure_sum.py --write    # 4, 16 and 64 clients, uploads of 3 and 17 MB

`client` is all that one client computes in a round beside training: its shares for the others, and
its upload as masked integers. `server` is what the server does with the masked uploads, with all
clients there, and with a third of them gone after they were counted in. `copy` is a copy of the
upload, for comparison. Bytes are those of the answers to the three steps, as they are sent; an
upload in the clear is the first column. One thread, medians of three.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from secrets import token_bytes

import numpy as np
import torch
from document import table, write

from fedalt.core.codec import encode
from fedalt.core.tree import Name
from fedalt.federation.messages import SumAnswer
from fedalt.federation.secure_client import MASKED
from fedalt.federation.secure_sum import (
    MASK,
    SECRET,
    SEED,
    agree,
    expand,
    integers,
    join,
    masked,
    modulo,
    public_of,
    seal,
    split,
    steps_of,
    stretched,
    threshold,
    unmask,
)

CLIENTS = (4, 16, 64)
NUMBERS = (786_432, 4_456_448)  # 3 and 17 MB in float32
TURNS = 3
ABOUT = "a benchmark"


def seconds(act: Callable[[], object]) -> float:
    """The median of what it takes."""
    taken = []
    for _ in range(TURNS):
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


class Round:
    """The clients of a round. Their uploads are all alike, on which nothing measured depends."""

    def __init__(self, clients: int, numbers: int) -> None:
        self.names = [f"client-{at:03d}" for at in range(clients)]
        self.needed = threshold(clients)
        self.tree = {Name("site", "individual", "A"): torch.randn(numbers) * 0.01}
        self.secrets = {name: token_bytes(SECRET) for name in self.names}
        self.seeds = {name: token_bytes(SECRET) for name in self.names}
        self.keys = {name: stretched(secret, MASK) for name, secret in self.secrets.items()}
        self.publics = {name: public_of(key) for name, key in self.keys.items()}
        self.numbers = numbers

    def share(self) -> dict[str, str]:
        """What the first client seals for the others."""
        own = self.names[0]
        secrets = (self.secrets[own], self.seeds[own])
        parts = zip(*(split(each, self.needed, len(self.names)) for each in secrets), strict=True)
        return {
            other: seal(agree(self.keys[own], self.publics[other], other), first + second).hex()
            for other, (first, second) in zip(self.names, parts, strict=True)
            if other != own
        }

    def mask(self) -> torch.Tensor:
        """The first client's masked upload."""
        own = self.names[0]
        seed = stretched(self.seeds[own], SEED)
        whole = modulo(integers(self.tree, steps_of(len(self.names))))
        vector = masked(whole, own, seed, self.keys[own], self.publics, ABOUT)
        return torch.from_numpy(vector.view("int32"))

    def unmasking(self, gone: int) -> Callable[[], object]:
        """What the server does once all shares are there."""
        away, there = self.names[:gone], self.names[gone:]
        told = {
            **{who: self.secrets[who] for who in away},
            **{who: self.seeds[who] for who in there},
        }
        count = len(self.names)
        shares = {
            who: dict(enumerate(split(secret, self.needed, count))) for who, secret in told.items()
        }
        uploads = expand(token_bytes(2 * SECRET), self.numbers)

        def act() -> object:
            total = np.zeros(self.numbers, np.uint32)
            for _ in there:
                total = total + uploads
            seeds = [stretched(join(shares[who], self.needed), SEED) for who in there]
            keys = {who: stretched(join(shares[who], self.needed), MASK) for who in away}
            return unmask(total, seeds, keys, {who: self.publics[who] for who in there}, ABOUT)

        return act

    def bytes_up(self) -> int:
        """Of the answers of one client."""
        about = ("federation", "0" * 32, self.names[0], 0, "0" * 32)
        shares = dict.fromkeys(self.names, "00" * SECRET)
        answers = (
            SumAnswer(*about, sealed=self.share()),
            SumAnswer(*about, masked={MASKED: torch.zeros(self.numbers, dtype=torch.int32)}),
            SumAnswer(*about, seeds=shares),
        )
        return sum(len(encode(answer)) for answer in answers)


def row(clients: int, numbers: int) -> dict[str, object]:
    """A line of the table."""
    at = Round(clients, numbers)
    plain = np.zeros(numbers, np.float32)
    return {
        "upload, MB": round(4 * numbers / 1e6, 1),
        "clients": clients,
        "sent, MB": round(at.bytes_up() / 1e6, 1),
        "copy, s": round(seconds(plain.copy), 4),
        "client, s": round(seconds(lambda: (at.share(), at.mask())), 3),
        "server, s": round(seconds(at.unmasking(0)), 2),
        "server, a third gone, s": round(seconds(at.unmasking(clients // 3)), 2),
    }


def main() -> None:
    """Measure all sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--numbers", type=int, nargs="+", default=NUMBERS, help="of an upload")
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(clients, numbers) for numbers in wanted.numbers for clients in wanted.clients]
    text = table(rows)
    print(text)
    if wanted.write:
        write("secure-sum", text)


if __name__ == "__main__":
    main()
