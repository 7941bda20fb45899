"""TLS towards both peers: contexts, and the channel binding of a server's certificate.

Towards the client we are a server with a certificate of the host's own CA; towards the target we are a client that
checks as far as the target's `sslmode` says, which has libpq's meaning (PostgreSQL manual, "SSL Support").
"""

from __future__ import annotations

import os
import ssl

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from proxy.model import Target, TlsMode


def server_context(descriptor: int, alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
    """A context that serves the key and chain in this descriptor (PEM), and speaks these protocols (RFC 7301). Closes
    the descriptor."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _restrict(context)
        # a client may come to another worker next, which cannot read the ticket of this one
        context.num_tickets = 0
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        if alpn:
            context.set_alpn_protocols(list(alpn))
    finally:
        os.close(descriptor)
    return context


def client_context(target: Target, alpn: tuple[str, ...] = (), certificate: bytes = b"") -> ssl.SSLContext:
    """A context that checks the target's certificate as far as its `sslmode` asks, offers these protocols, and shows
    this certificate (PEM, key and chain).

    Raises `ssl.SSLError` when `ca_pem` or `certificate` hold none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _restrict(context)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if certificate:
        _load(context, certificate)
    match target.tls_mode:
        case TlsMode.VERIFY_FULL:
            context.check_hostname = True
        case TlsMode.VERIFY_CA:
            context.check_hostname = False
        case TlsMode.DISABLE | TlsMode.ALLOW | TlsMode.PREFER | TlsMode.REQUIRE:
            context.check_hostname = False
            # libpq: `require` with a root certificate at hand checks like `verify-ca`
            if not (target.ca_pem and target.tls_mode is TlsMode.REQUIRE):
                context.verify_mode = ssl.CERT_NONE
                return context
    if target.ca_pem:
        context.load_verify_locations(cadata=target.ca_pem)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def _restrict(context: ssl.SSLContext) -> None:
    """TLS 1.2 and 1.3, and one handshake for each connection."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION


def _load(context: ssl.SSLContext, certificate: bytes) -> None:
    """OpenSSL reads keys from files only."""
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, certificate)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def end_point_binding(certificate_der: bytes) -> bytes:
    """The tls-server-end-point channel binding of a certificate (RFC 5929, section 4.1): its hash by the signature's
    own hash function, SHA-256 in the place of MD5 and SHA-1. Empty where the signature has no hash (Ed25519), as the
    RFC leaves that undefined."""
    certificate = x509.load_der_x509_certificate(certificate_der)
    algorithm = certificate.signature_hash_algorithm
    if algorithm is None:
        return b""
    if isinstance(algorithm, hashes.MD5 | hashes.SHA1):
        algorithm = hashes.SHA256()
    digest = hashes.Hash(algorithm)
    digest.update(certificate_der)
    return digest.finalize()


def explain(error: Exception) -> str:
    """An `ssl` or socket error in words for an operator, without the library's source positions."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted: {error.verify_message.rstrip('.')}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {(error.reason or str(error)).lower().replace('_', ' ')}"
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    if isinstance(error, ConnectionResetError | ConnectionAbortedError):
        return "connection reset by peer"
    return str(error) or type(error).__name__
