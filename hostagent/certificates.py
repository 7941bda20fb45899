"""The host's own certificate authority, and the serving certificates that it signs for targets.

`<state_dir>/ca/ca.pem` (for everybody) and `ca.key` (root only) are made together at first start and renamed into place
as one directory, so that there are always both or none. Leaves live in memory only: 30 days, renewed ten days before.

Blind spot: there is no revocation. Whoever trusts `ca.pem` trusts this host's root for every name.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hostagent.errors import OperatorError

_CA_LIFE = datetime.timedelta(days=3650)
_LEAF_LIFE = datetime.timedelta(days=30)
_RENEW_BEFORE = datetime.timedelta(days=10)
_BACKDATE = datetime.timedelta(hours=1)
_DNS_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?")


class CertificateError(OperatorError):
    """The authority cannot be used, or a name cannot be certified."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """`pem` holds the key and then the chain. `not_after_s` is seconds since the epoch."""

    pem: bytes = field(repr=False)
    not_after_s: int


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class HostAuthority:
    """Signs serving certificates. Made by `open_authority`."""

    def __init__(
        self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, clock: Callable[[], datetime.datetime]
    ) -> None:
        self._certificate = certificate
        self._key = key
        self._clock = clock
        self._leaves: dict[tuple[str, tuple[str, ...]], Leaf] = {}

    @property
    def pem(self) -> bytes:
        """The authority's certificate, which clients have to trust."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def leaf(self, server_name: str, addresses: Iterable[str]) -> Leaf:
        """A certificate for the name (may be empty) and the numeric addresses, from memory while it is fresh.

        Raises `CertificateError`.
        """
        wanted = (server_name, tuple(sorted(set(addresses))))
        kept = self._leaves.get(wanted)
        if kept is None or kept.not_after_s < (self._clock() + _RENEW_BEFORE).timestamp():
            kept = self._sign(*wanted)
            self._leaves[wanted] = kept
        return kept

    def _sign(self, server_name: str, addresses: tuple[str, ...]) -> Leaf:
        now = self._clock()
        until = min(now + _LEAF_LIFE, self._certificate.not_valid_after_utc)
        if until <= now:
            raise CertificateError(_expired(self._certificate))
        key = ec.generate_private_key(ec.SECP256R1())
        issuer_id = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name("Hopgate gateway"))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - _BACKDATE, self._certificate.not_valid_before_utc))
            .not_valid_after(until)
            .add_extension(x509.SubjectAlternativeName(_subjects(server_name, addresses)), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = _key_pem(key) + certificate.public_bytes(serialization.Encoding.PEM) + self.pem
        return Leaf(pem, int(certificate.not_valid_after_utc.timestamp()))


def serving_leaf(pem: bytes) -> Leaf:
    """A serving certificate that somebody else has issued to the gateway: the key and then the chain, in PEM. Raises
    `CertificateError`."""
    try:
        certificate = x509.load_pem_x509_certificates(pem)[0]
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise CertificateError("the serving certificate cannot be parsed: wants its PEM key and chain") from None
    if key.public_key() != certificate.public_key():
        raise CertificateError("the serving certificate's key is not its own")
    if certificate.not_valid_after_utc <= utc_now():
        raise CertificateError(f"the serving certificate expired on `{certificate.not_valid_after_utc:%Y-%m-%d}`")
    return Leaf(pem, int(certificate.not_valid_after_utc.timestamp()))


def open_authority(state_dir: Path, clock: Callable[[], datetime.datetime] = utc_now) -> HostAuthority:
    """Opens the host's authority, and makes it when there is none. Raises `CertificateError`."""
    directory = state_dir / "ca"
    try:
        if not directory.exists():
            _make(directory, clock())
        key_pem = _read_private(directory / "ca.key")
        certificate_pem = (directory / "ca.pem").read_bytes()
    except OSError as error:
        raise CertificateError(
            f"cannot open the host's certificate authority in `{directory}`: {error.strerror}: `{error.filename}`; "
            "restore it, or move the directory away to have a new one made"
        ) from error
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise CertificateError(
            f"the host's certificate authority in `{directory}` cannot be parsed; "
            "restore it, or move the directory away to have a new one made"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise CertificateError(
            f"`{directory}/ca.key` is not the key of `{directory}/ca.pem`; "
            "restore the pair, or move the directory away to have a new one made"
        )
    if certificate.not_valid_after_utc <= clock():
        raise CertificateError(f"{_expired(certificate)} (`{directory}`)")
    return HostAuthority(certificate, key, clock)


def _expired(certificate: x509.Certificate) -> str:
    return (
        f"the host's certificate authority expired on `{certificate.not_valid_after_utc:%Y-%m-%d}`; move its directory "
        "away, restart, and give clients the new ca.pem"
    )


def _read_private(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise CertificateError(f"`{path}` has mode `{mode:04o}`, others may use it: `chmod 600 {path}`")
        return file.read()


def _make(directory: Path, now: datetime.datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"Hopgate host authority {os.uname().nodename}"[:64])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + _CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    whole = directory.with_name(f".ca.{secrets.token_hex(4)}")
    whole.mkdir(mode=0o700)
    try:
        _write(whole / "ca.key", _key_pem(key), 0o600)
        _write(whole / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        whole.chmod(0o755)
        whole.rename(directory)
    except OSError:
        shutil.rmtree(whole, ignore_errors=True)
        raise


def _write(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _subjects(server_name: str, addresses: tuple[str, ...]) -> list[x509.GeneralName]:
    subjects: list[x509.GeneralName] = []
    numeric = list(addresses)
    if server_name:
        try:
            ipaddress.ip_address(server_name)
            numeric.insert(0, server_name)
        except ValueError:
            if not _DNS_NAME.fullmatch(server_name):
                raise CertificateError(f"`{server_name}` is no name that a certificate can carry") from None
            subjects.append(x509.DNSName(server_name.rstrip(".")))
    try:
        subjects += [x509.IPAddress(ipaddress.ip_address(address)) for address in dict.fromkeys(numeric)]
    except ValueError as error:
        raise CertificateError(f"no certificate for `{server_name}`: {error}") from error
    if not subjects:
        raise CertificateError("a certificate needs a name or an address")
    return subjects


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )
