"""Which keys Flower's server and the gateway let in: those of the clients' folder alone."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import httpx
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient

from fedalt.federation.owner_messages import Say
from fedalt.flower.client_keys import ClientKeys, key_text
from fedalt.flower.places import ServerPlace
from fedalt.flower.processes import ProcessDiedError
from fedalt.flower.signatures import write_keys

_SHUT_OUT = "unregistered"  # Flower's word for a key that is never let in again


@dataclass
class Admission:
    """Tells Flower and the gateway whose keys are let in, whenever the clients' folder changes."""

    keys: ClientKeys
    reported: frozenset[str] = frozenset()
    settled: object = None

    def update(self, port: int, say: Say) -> None:
        """Look at the folder; `port` is that of Flower's server. Says once what is wrong.

        Raises ProcessDiedError where Flower's server does not answer.
        """
        keys, before = self.keys, self.keys.troubles
        clients = dict(keys.now())
        wrong = keys.troubles | keys.strays
        for trouble in sorted(wrong - self.reported):
            say(f"{trouble}; it is looked at again when that changes")
        if before and not keys.troubles:
            say("every client's key is in order again")
        self.reported = wrong
        known, place = set(keys.known.values()), keys.config.place
        if (state := (port, clients, known)) == self.settled:
            return
        write_keys(place.let_in, clients)
        try:
            register_keys(port, place, clients, known, say)
        except httpx.HTTPError as error:
            raise ProcessDiedError(f"Flower's server does not answer: {error}") from error
        self.settled = state


def register_keys(
    port: int, place: ServerPlace, clients: Mapping[str, str], others: Collection[str], say: Say
) -> None:
    """Register the keys of these clients, by public key; all but `others` are shut out.

    That is for good: Flower never lets a key in again that it has shut out.
    """
    authority = None if place.insecure else place.authority.read_bytes()
    address = f"127.0.0.1:{port}"
    with ControlHttpClient.from_server_address(address, place.insecure, authority, ()) as control:
        nodes = control.ListNodes(ListNodesRequest()).nodes_info
        known = {key_text(node.public_key): node for node in nodes if node.status != _SHUT_OUT}
        for key, node in known.items():
            if key not in clients and key not in others:
                control.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
                say("a key that no longer belongs to a client is not accepted any more")
        for key in clients.keys() - known.keys():
            try:
                control.RegisterNode(RegisterNodeRequest(public_key=key.encode()))
            except httpx.HTTPStatusError as error:
                say(
                    f"{clients[key]}: Flower does not take its key ({error.response.text}); "
                    "a key that was shut out once is never let in again, so make another"
                )
