"""How processes of this machine meet and send each other bytes: torch.distributed over gloo."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fedalt.codec import decode, encode

T = TypeVar("T")

_LOOPBACK: Final = "127.0.0.1"
_FOREVER: Final = timedelta(days=365)  # whether the others live is seen by other means


@dataclass(frozen=True)
class Place:
    """Which process it is of how many, and the port at which the first one waits.

    `cuda` tells GPUs from CPU cores, of which each process uses `threads`.
    """

    process: int
    of: int
    port: int
    cuda: bool
    threads: int


def post(message: object, to: int) -> list[dist.Work]:
    """Send a message behind its length; it has to be waited for."""
    data = torch.frombuffer(bytearray(encode(message)), dtype=torch.uint8)
    parts = torch.tensor([len(data)]), data
    return [cast(dist.Work, dist.isend(part, to)) for part in parts]


def receive(cls: type[T], of: int) -> T:
    """The next message of a process; waits for it."""
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, of)
    data = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(data, of)
    return decode(cls, data.numpy().tobytes())


def wait(sent: Iterable[dist.Work]) -> None:
    """Until all of a message is on its way."""
    for each in sent:
        each.wait()


def meeting(port: int | None = None) -> TCPStore:
    """Where the processes find each other: a new one here, or that of the first process."""
    if port is not None:
        return TCPStore(_LOOPBACK, port, is_master=False, timeout=_FOREVER)
    with socket.socket() as listening:  # by itself it would listen on every interface
        listening.bind((_LOOPBACK, 0))
        listening.listen()
        port = listening.getsockname()[1]
        return TCPStore(
            _LOOPBACK,
            port,
            is_master=True,
            timeout=_FOREVER,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )


@contextmanager
def connected(
    place: Place, store: TCPStore, attend: Callable[[Callable[[], Any]], Any]
) -> Iterator[None]:
    """Within it all processes can be sent to and received from."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    with _environment({"GLOO_SOCKET_IFNAME": names[0]}):  # gloo cannot be told in another way
        attend(
            lambda: dist.init_process_group(
                "gloo", store=store, rank=place.process, world_size=place.of, timeout=_FOREVER
            )
        )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def computing(place: Place) -> Iterator[None]:
    """Compute on this process's own GPU, or with its own share of the CPU's cores."""
    if place.cuda:
        torch.cuda.set_device(place.process)
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(place.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
