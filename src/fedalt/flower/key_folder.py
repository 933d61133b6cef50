"""Clients' public keys in a folder, by which what they have signed for a secure sum is checked.

A server has those that it lets in; a client has its peers', which came with its own folder, so that
no server can put others in their place.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedalt.core.declared import SettingsError
from fedalt.federation.secure_sum import SecureSumError
from fedalt.flower.credentials import pem_of, secret_of

PEERS: Final = "peers"  # the folder of its peers' keys in a client's folder


@dataclass(frozen=True)
class KeyFolder:
    """`folder` holds NAME.pub of each client; `key` is one's own private key. Read when needed."""

    folder: Path
    key: Path | None = None

    def sign(self, content: bytes) -> bytes:
        """A signature (ECDSA with SHA-384) by the own key. Raises SecureSumError."""
        assert self.key is not None
        try:
            return secret_of(self.key).sign(content, ECDSA(SHA384()))
        except (SettingsError, OSError):  # their texts have paths, and this one leaves the machine
            raise SecureSumError(f"its own key, {self.key.name}, cannot be used") from None

    def check(self, client_id: str, content: bytes, signature: bytes) -> None:
        """Raise SecureSumError unless the client of this name has signed the content."""
        file = self.folder / f"{client_id}.pub"
        try:
            key = load_pem_public_key(pem_of(file).encode())
        except SettingsError:
            raise SecureSumError(
                f"the keys of {client_id!r} cannot be checked: {file.parent.name}/{file.name} is "
                "missing, or no public key"
            ) from None
        assert isinstance(key, EllipticCurvePublicKey)
        try:
            key.verify(signature, content, ECDSA(SHA384()))
        except InvalidSignature:
            raise SecureSumError(
                f"the keys that {client_id!r} is said to have sent are not signed by the key in "
                f"{file.parent.name}/{file.name}; if it has a new one, its file belongs there, "
                "else it has trained on another broadcast"
            ) from None
