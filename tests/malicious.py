"""A client that sends other answers than its own: `python tests/malicious.py CLIENT.TOML`."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedalt.core.codec import decode, encode
from fedalt.federation.client import Client
from fedalt.federation.messages import Answer, Call

# What it does in which round, and how the server's reason begins.
PLAN: Mapping[int, tuple[str, str]] = {
    1: ("nan", "it cannot be read"),
    3: ("huge", "the upload's norm is"),
    5: ("shape", "the upload has"),
    7: ("identity", "it is from client 'a', but 'd' was called"),
    9: ("yesterday", "it is of round 1, but round 10 was asked for"),
    11: ("truncated", "it cannot be read"),
    13: ("gigantic", "the upload has"),
    15: ("flood", ""),  # the gateway does not take it; then it sends its own
    16: ("no loss", "the score of column 'own' has no 'loss'"),
    17: ("tempting loss", "the score of column 'own': loss is -1000000.0"),
    18: ("round to come", "the score of column 'own' is of round 1000000"),
    19: ("no costs", "the cost of column 'local' is missing"),
}
GIGANTIC = 20 * 2**20  # bytes, more than the drill's server allows
FLOOD = 200 * 2**20  # more than its door passes on


@dataclass(frozen=True)
class Malicious:
    """A member whose answers are not left as they are; `flood` says whether it tries that too."""

    member: Client
    flood: bool = True

    @property
    def client_id(self) -> str:
        """Who it says it is when it connects."""
        return self.member.client_id

    def answer(self, data: bytes) -> bytes:
        """What it sends instead of its own answer."""
        honest = self.member.answer(data)
        call = decode(Call, data)
        if not call.train:
            return honest
        first = self.member.folder / "first.bin"
        if not first.exists():
            first.write_bytes(honest)
        kind = PLAN.get(call.round, ("", ""))[0]
        if kind == "flood":
            done = self.member.folder / "flooded"
            if done.exists() or not self.flood:
                return honest
            done.touch()
            return os.urandom(FLOOD)
        return SPOIL.get(kind, _as_it_is)(honest, first.read_bytes())


def _as_it_is(honest: bytes, _: bytes) -> bytes:
    return honest


def _upload(change: Callable[[Any], Any], honest: bytes, _: bytes) -> bytes:
    """The same answer with every tensor of its upload changed."""
    answer = decode(Answer, honest)
    assert answer.upload is not None
    tree = {name: change(tensor) for name, tensor in answer.upload.tree.items()}
    return encode(replace(answer, upload=replace(answer.upload, tree=tree)))


def _scores(changes: Mapping[str, Any], honest: bytes, _: bytes) -> bytes:
    """The same answer with something else in each of its scores."""
    answer = decode(Answer, honest)
    return encode(replace(answer, scores=tuple(replace(each, **changes) for each in answer.scores)))


SPOIL: Mapping[str, Callable[[bytes, bytes], bytes]] = {
    "nan": partial(_upload, lambda tensor: torch.full_like(tensor, float("nan"))),
    "huge": partial(_upload, lambda tensor: torch.full_like(tensor, 1e30)),
    "shape": partial(_upload, lambda tensor: tensor.repeat(2, 1)),
    "identity": lambda honest, _: encode(replace(decode(Answer, honest), client="a")),
    "yesterday": lambda _, first: first,
    "truncated": lambda honest, _: honest[: len(honest) // 2],
    "no loss": partial(_scores, {"metrics": {}}),
    "tempting loss": partial(_scores, {"metrics": {"loss": -1e6}}),
    "round to come": partial(_scores, {"round": 999_999}),
    "no costs": lambda honest, _: encode(replace(decode(Answer, honest), costs=())),
    "gigantic": lambda honest, _: honest + bytes(GIGANTIC),
}


def main() -> None:
    """Take part like `fedalt client`."""
    from fedalt.flower import client_process
    from fedalt.flower.config import read_client_config

    opened = client_process.client_from
    client_process.client_from = lambda *words, **flags: Malicious(opened(*words, **flags))  # type: ignore
    client_process.run_client(
        read_client_config(Path(sys.argv[1])), lambda text: print(text, flush=True)
    )


if __name__ == "__main__":
    main()
