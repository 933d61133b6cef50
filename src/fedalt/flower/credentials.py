"""A federation's own certificate authority, its server's certificate, and a key for each client."""

import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
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
    load_ssh_public_key,
)
from cryptography.x509.oid import NameOID

from fedalt.runs.settings import SettingsError

_AUTHORITY_YEARS: Final = 10
_SERVER_YEARS: Final = 2
_LONGEST_KEY: Final = 2**16  # bytes that are read of a public key


def make_authority(folder: Path, federation: str) -> None:
    """ca.crt and ca.key: whoever has the key can pass for the server."""
    key = generate_private_key(SECP384R1())
    name = _name(f"{federation}, certificate authority")
    builder = (
        _builder(name, name, key, _AUTHORITY_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    _put_certificate(folder / "ca.crt", builder.sign(key, SHA384()))
    _put_secret(folder / "ca.key", _pem(key))


def make_server(folder: Path, authority: Path, hosts: list[str], days: int | None = None) -> None:
    """server.crt and server.key for these names and addresses, signed by the authority."""
    ca = x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes())
    ca_key = load_pem_private_key((authority / "ca.key").read_bytes(), None)
    assert isinstance(ca_key, EllipticCurvePrivateKey)
    key = generate_private_key(SECP384R1())
    names = x509.SubjectAlternativeName([_host(each) for each in dict.fromkeys(hosts)])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = (
        _builder(_name(hosts[0]), ca.subject, key, _SERVER_YEARS, days)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(issuer, critical=False)
    )
    _put_certificate(folder / "server.crt", builder.sign(ca_key, SHA384()))
    _put_secret(folder / "server.key", _pem(key))


def make_client_key(secret: Path, public: Path) -> None:
    """A client's key pair, in OpenSSH's format as Flower wants it."""
    key = generate_private_key(SECP384R1())
    _put_secret(secret, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


def require_usable(certificate: Path, key: Path, authority: Path) -> None:
    """Refuse a server's certificate that no client would take. Raises SettingsError, OSError."""
    for each in (certificate, key, authority):
        each.read_bytes()  # its error names the file
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
        issuer = x509.load_pem_x509_certificate(authority.read_bytes())
        found.verify_directly_issued_by(issuer)
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (ValueError, TypeError, InvalidSignature, ssl.SSLError) as error:
        why = str(error) or "it was not signed by this authority"
        raise SettingsError(f"{certificate}, {key} and {authority}: {why}") from None
    for file, end in (
        (certificate, found.not_valid_after_utc),
        (authority, issuer.not_valid_after_utc),
    ):
        if end < datetime.now(UTC):
            raise SettingsError(f"{file}: the certificate has ended on {end:%Y-%m-%d}")


def pem_of(public: Path) -> str:
    """A public key as Flower's server shows it. Raises SettingsError, also where it is cut off."""
    try:
        if not public.is_file():  # to read a pipe would be to wait for ever
            raise SettingsError(f"{public}: cannot be read: it is no file")
        with public.open("rb") as file:
            key = load_ssh_public_key(file.read(_LONGEST_KEY))
    except OSError as error:
        raise SettingsError(f"{public}: cannot be read: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"{public}: it is no public key: {error}") from None
    if not isinstance(key, EllipticCurvePublicKey):
        raise SettingsError(
            f"{public}: it is no public key of this kind: expected ecdsa-sha2-nistp384, as "
            "`fedalt federation init` makes them"
        )
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: EllipticCurvePrivateKey,
    years: int,
    days: int | None = None,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))  # clocks differ
        .not_valid_after(now + timedelta(days=365 * years if days is None else days))
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


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _put_certificate(path: Path, certificate: x509.Certificate) -> None:
    path.write_bytes(certificate.public_bytes(Encoding.PEM))


def _put_secret(path: Path, data: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(data)
