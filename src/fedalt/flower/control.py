"""Which keys Flower's server lets in: those of the clients' folder, and no others."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import httpx
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient

from fedalt.flower.config import ServerPlace
from fedalt.flower.records import text_of

_GONE = "unregistered"  # Flower's word for a key that is never let in again

Say = Callable[[str], None]


@dataclass(frozen=True)
class Control:
    """The interface of Flower's server for its operator, at a port of loopback."""

    port: int
    place: ServerPlace

    def let_in(self, clients: Mapping[str, str], others: Collection[str], say: Say) -> None:
        """Register the keys of these clients, by public key; all but `others` are shut out.

        That is for good: Flower never lets a key in again that it has shut out.
        """
        insecure = self.place.insecure
        authority = None if insecure else self.place.authority.read_bytes()
        address = f"127.0.0.1:{self.port}"
        with ControlHttpClient.from_server_address(address, insecure, authority, ()) as client:
            nodes = client.ListNodes(ListNodesRequest()).nodes_info
            known = {text_of(each.public_key): each for each in nodes if each.status != _GONE}
            for key, node in known.items():
                if key not in clients and key not in others:
                    client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
                    say("a key that is no client's any more is shut out")
            for key in clients.keys() - known.keys():
                try:
                    client.RegisterNode(RegisterNodeRequest(public_key=key.encode()))
                except httpx.HTTPStatusError as error:
                    say(
                        f"{clients[key]}: Flower does not take its key ({error.response.text}); "
                        "a key that was shut out once is never let in again, so make another"
                    )
