"""Whether a request was signed with a client's key: told by its headers, before its body is read.

Flower signs the time at which a request is made, and nothing else of it. How it does so is part of
what goes over the wire, so it is written down here; a test holds it against Flower's own client.
"""

import json
import time
from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from fedalt.core.files import atomic_write

AHEAD: Final = 5.0  # seconds that a client's clock may be before the server's, by Flower's rules
BEHIND: Final = 305.0
_PUBLIC_KEY: Final = "flwr-public-key"  # names of headers
_SIGNATURE: Final = "flwr-signature"
_TIME: Final = "flwr-timestamp"
_SCHEME: Final = ECDSA(SHA256())
_REMEMBERED: Final = 700.0  # seconds; more than `AHEAD` and `BEHIND` together
_MOST_REMEMBERED: Final = 20_000  # requests of one key within that time; a client makes 5 a second
_ACTIVATE: Final = "activate-node"
_UNKNOWN: Final = "no client has this key"
# In Flower's form, with its number for a node that may not be activated: its client knows that.
_NOT_LET_IN: Final = json.dumps({"code": 2004, "detail": _UNKNOWN})


class UnsignedError(Exception):
    """A request is not a client's: the code and text of the answer, and what kind of refusal."""

    def __init__(self, code: int, text: str, kind: str | None = None) -> None:
        super().__init__(text)
        self.code, self.text, self.kind = code, text, kind or text


def write_keys(file: Path, clients: Mapping[str, str]) -> None:
    """Tell who is let in: clients by public key, in the form that Flower sends keys in."""
    atomic_write(file, json.dumps(sorted(clients)).encode())


@dataclass
class Signatures:
    """The keys of a file that `write_keys` wrote, and the requests of the last minutes.

    Without a file nobody is let in.
    """

    file: Path | None
    keys: dict[bytes, EllipticCurvePublicKey] = field(default_factory=dict)
    _read_as: object = None  # what the file was when it was read
    _requests: dict[bytes, OrderedDict[str, float]] = field(default_factory=dict)  # by key, age

    def read(self) -> None:
        """Look whether the file has changed."""
        if self.file is None:
            return
        stat = self.file.stat()
        if (state := (stat.st_mtime_ns, stat.st_ino)) == self._read_as:
            return
        pems = [pem.encode() for pem in json.loads(self.file.read_text())]
        self.keys = {pem: _public_key(pem) for pem in pems}
        self._requests = {key: times for key, times in self._requests.items() if key in self.keys}
        self._read_as = state

    def key_of(self, headers: Mapping[str, str], call: str) -> bytes:
        """The key that a request is signed with, made now and for the first time.

        Raises UnsignedError for any other, with the answer that Flower's server would give to it.
        """
        try:
            key = b64decode(headers[_PUBLIC_KEY], validate=True)
            signature = b64decode(headers[_SIGNATURE], validate=True)
            when = headers[_TIME]
            age = (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()
        except (KeyError, ValueError, TypeError):  # a time without a zone is the last
            raise UnsignedError(401, "no signature of a client") from None
        if (known := self.keys.get(key)) is None:
            # Flower's client tells this answer from others, and only to this request.
            code, text = (412, _NOT_LET_IN) if call == _ACTIVATE else (401, _UNKNOWN)
            raise UnsignedError(code, text, _UNKNOWN)
        if not -AHEAD < age < BEHIND:
            raise UnsignedError(401, "the signature is not of now; look at this machine's clock")
        try:
            known.verify(signature, when.encode(), _SCHEME)
        except InvalidSignature:
            raise UnsignedError(401, "the signature is not one of this key") from None
        self._remember(key, when)
        return key

    def _remember(self, key: bytes, when: str) -> None:
        """Take a signature once.

        What it stands for is remembered: whoever has one can write it in another way.
        """
        now, requests = time.monotonic(), self._requests.setdefault(key, OrderedDict())
        while requests and now - next(iter(requests.values())) > _REMEMBERED:
            requests.popitem(last=False)
        if when in requests:
            raise UnsignedError(409, "this request has been made before")
        if len(requests) >= _MOST_REMEMBERED:
            raise UnsignedError(429, "too many requests with one key")
        requests[when] = now


def signed_headers(key: EllipticCurvePrivateKey) -> dict[str, str]:
    """The headers by which the server knows whose request it is, made now."""
    when = datetime.now(UTC).isoformat()
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signature = key.sign(when.encode(), _SCHEME)
    return {
        _PUBLIC_KEY: b64encode(public).decode(),
        _TIME: when,
        _SIGNATURE: b64encode(signature).decode(),
    }


def _public_key(pem: bytes) -> EllipticCurvePublicKey:
    key = load_pem_public_key(pem)
    if not isinstance(key, EllipticCurvePublicKey):
        raise TypeError("a client's key is one of an elliptic curve")
    return key
