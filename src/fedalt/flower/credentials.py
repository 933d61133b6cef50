"""A federation's own certificate authority, its server's certificate, and a key for each client."""

import contextlib
import ipaddress
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import NameOID

from fedalt.core.files import atomic_write
from fedalt.federation.secure_sum import SecureSumError
from fedalt.runs.settings import SettingsError

PEERS: Final = "peers"  # the folder of its peers' keys in a client's folder
_AUTHORITY_YEARS: Final = 10
_SERVER_YEARS: Final = 2
_LONGEST_KEY: Final = 2**16  # bytes that are read of a key or certificate
_ANOTHER: Final = "make another one, as docs/deployment.md says under 'A new certificate'"
_Names: Final = x509.SubjectAlternativeName
# Flower listens there, and the gateway and Flower's own commands want to know whom they reach.
_OWN_PROCESSES: Final = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
_EXPECTED: Final = "expected ecdsa-sha2-nistp384, as `fedalt federation init` makes them"


def make_authority(folder: Path, federation: str) -> None:
    """ca.crt and ca.key: whoever has the key can pass for the server."""
    key = generate_private_key(SECP384R1())
    name = _name(f"{federation}, certificate authority")
    builder = (
        _builder(name, name, key, 365 * _AUTHORITY_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    _write_pair(folder, "ca", builder.sign(key, SHA384()), key)


def make_server(folder: Path, authority: Path, hosts: list[str], days: int | None = None) -> None:
    """server.crt and server.key for these names and addresses, signed by the authority."""
    ca = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
    ca_key = load_pem_private_key((authority / "ca.key").read_bytes(), None)
    assert isinstance(ca_key, EllipticCurvePrivateKey)
    key = generate_private_key(SECP384R1())
    names = _Names([_host(host) for host in dict.fromkeys(hosts)])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    lifetime = 365 * _SERVER_YEARS if days is None else days
    builder = (
        _builder(_name(hosts[0]), ca.subject, key, lifetime)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(issuer, critical=False)
    )
    _write_pair(folder, "server", builder.sign(ca_key, SHA384()), key)


def make_client_key(secret: Path, public: Path) -> None:
    """A client's key pair, in OpenSSH's format as Flower wants it, in the place of an older one."""
    key = generate_private_key(SECP384R1())
    data = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    atomic_write(secret, data)
    atomic_write(public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


def require_server_credentials(certificate: Path, key: Path, authority: Path) -> None:
    """Refuse a server's certificate that no client would take. Raises SettingsError, OSError."""
    own, issuer, data = _certificate(certificate), _certificate(authority), _content(key)
    try:
        secret = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SettingsError(
            f"{key}: it is no private key ({error}); expected one in PEM without a pass phrase"
        ) from None
    if secret.public_key() != own.public_key():
        raise SettingsError(f"{key}: it is not the key of {certificate}; put the two back together")
    try:
        own.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        raise SettingsError(
            f"{certificate}: it was not signed by the authority of {authority}, which clients "
            f"trust; {_ANOTHER}"
        ) from None
    if _OWN_PROCESSES not in _names_of(own):
        raise SettingsError(
            f"{certificate}: it does not name {_OWN_PROCESSES.value}, where the server's own "
            f"processes reach each other; {_ANOTHER}"
        )
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise SettingsError(f"{certificate} and {key}: {error}") from None


def names_host(certificate: Path, host: str) -> bool:
    """Whether clients that call a host would take the certificate to be its."""
    name = str(_host(host).value).lower()
    names = {str(each.value).lower() for each in _names_of(_certificate(certificate))}
    return not names.isdisjoint({name, f"*.{name.partition('.')[2]}"})


def require_client_credentials(key: Path, authority: Path | None) -> None:
    """Refuse a client's key or authority (None without TLS) that Flower's client cannot use.

    Raises SettingsError, and OSError for a file that cannot be read.
    """
    secret_of(key)
    if authority is not None:
        _certificate(authority)


def secret_of(key: Path) -> EllipticCurvePrivateKey:
    """A client's private key. Raises SettingsError, and OSError for a file that cannot be read."""
    data = _content(key)
    try:
        secret = load_ssh_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"{key}: it is no private key ({error}); {_EXPECTED}") from None
    if not isinstance(secret, EllipticCurvePrivateKey):
        raise SettingsError(f"{key}: it is no private key of this kind; {_EXPECTED}")
    return secret


def pem_of(public: Path) -> str:
    """A public key as Flower's server shows it. Raises SettingsError, also where it is cut off."""
    try:
        data = _content(public)
    except OSError as error:
        raise SettingsError(f"{public}: cannot be read: {error.strerror}") from None
    try:
        key = load_ssh_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"{public}: it is no public key: {error}") from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise SettingsError(f"{public}: it is no public key of this kind: {_EXPECTED}")
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def _content(file: Path) -> bytes:
    """What a file holds, at most; SettingsError for a pipe, on which a reader waits for ever."""
    if file.exists() and not file.is_file():
        raise SettingsError(f"{file}: cannot be read: it is no file")
    with file.open("rb") as stream:
        return stream.read(_LONGEST_KEY)


def _certificate(file: Path) -> x509.Certificate:
    """A certificate that is valid today. Raises SettingsError, OSError."""
    data = _content(file)
    try:
        certificate = x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise SettingsError(
            f"{file}: it is no certificate ({error}); expected one in PEM, as `fedalt federation "
            "init` makes them"
        ) from None
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if end < datetime.now(UTC):
        raise SettingsError(f"{file}: the certificate expired on {end:%Y-%m-%d}; {_ANOTHER}")
    if begin > datetime.now(UTC):
        raise SettingsError(
            f"{file}: the certificate is valid only from {begin:%Y-%m-%d %H:%M} UTC on; set this "
            f"machine's clock, or {_ANOTHER}"
        )
    return certificate


def _names_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    with contextlib.suppress(x509.ExtensionNotFound):
        return list(certificate.extensions.get_extension_for_class(_Names).value)
    return []


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _write_pair(
    folder: Path, name: str, certificate: x509.Certificate, key: EllipticCurvePrivateKey
) -> None:
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    atomic_write(folder / f"{name}.crt", certificate.public_bytes(Encoding.PEM))
    atomic_write(folder / f"{name}.key", secret)


@dataclass(frozen=True)
class KeyFolder:
    """Public keys by which what clients have signed for a secure sum is checked.

    `folder` holds NAME.pub of each client; `key` is one's own private key. Read when needed. A
    server has those that it lets in; a client has its peers', which came with its own folder, so
    that no server can put others in their place.
    """

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
