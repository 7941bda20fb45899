"""The host's authority: what it signs is what a strict client wants, and a broken one is told and not replaced."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509

from hostagent.certificates import CertificateError, open_authority, utc_now


def handshake(tmp_path: Path, pem: bytes, trusted: Path, name: str) -> None:
    """A TLS handshake with a client that verifies as strictly as OpenSSL can."""
    chain = tmp_path / "leaf.pem"
    chain.write_bytes(pem)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(chain)
    client = ssl.create_default_context(cafile=str(trusted))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as secured:
            assert secured.version() == "TLSv1.3"
    finally:
        ours.close()
        thread.join()


def test_a_strict_client_accepts_the_name_and_the_addresses_and_no_other(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    leaf = authority.leaf("orders.db.example", ["192.0.2.7", "2001:db8::7"])
    for name in ("orders.db.example", "192.0.2.7", "2001:db8::7"):
        handshake(tmp_path, leaf.pem, tmp_path / "ca" / "ca.pem", name)
    for name in ("other.db.example", "192.0.2.8"):
        with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
            handshake(tmp_path, leaf.pem, tmp_path / "ca" / "ca.pem", name)
    assert b"PRIVATE" not in repr(leaf).encode()


def test_the_authority_is_made_once_with_tight_modes(tmp_path: Path) -> None:
    first = open_authority(tmp_path)
    assert open_authority(tmp_path).pem == first.pem == (tmp_path / "ca" / "ca.pem").read_bytes()
    assert stat.S_IMODE((tmp_path / "ca" / "ca.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "ca" / "ca.pem").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["ca"]
    certificate = x509.load_pem_x509_certificate(first.pem)
    limits = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (limits.critical, limits.value.ca, limits.value.path_length) == (True, True, 0)
    years = (certificate.not_valid_after_utc - utc_now()).days / 365
    assert 9.9 < years < 10.1


def test_a_leaf_is_kept_while_it_is_fresh_and_renewed_in_time(tmp_path: Path) -> None:
    now = [utc_now()]
    authority = open_authority(tmp_path, lambda: now[0])
    first = authority.leaf("db", ["192.0.2.7"])
    assert first.not_after_s == pytest.approx((now[0] + datetime.timedelta(days=30)).timestamp(), abs=2)
    now[0] += datetime.timedelta(days=19)
    assert authority.leaf("db", ["192.0.2.7"]) is first
    assert authority.leaf("db", ["192.0.2.8"]) is not first
    now[0] += datetime.timedelta(days=2)
    second = authority.leaf("db", ["192.0.2.7"])
    assert second.not_after_s > first.not_after_s
    now[0] += datetime.timedelta(days=3650 - 21 - 5)
    assert authority.leaf("db", ["192.0.2.7"]).not_after_s < (now[0] + datetime.timedelta(days=6)).timestamp()
    now[0] += datetime.timedelta(days=10)
    with pytest.raises(CertificateError, match="expired on"):
        authority.leaf("db", ["192.0.2.7"])
    with pytest.raises(CertificateError, match="move its directory away"):
        open_authority(tmp_path, lambda: now[0])


@pytest.mark.parametrize("name", ["a b", "bücher.example", "*.example", "x" * 300, "-a", "a..b", "a\n"])
def test_a_name_that_no_certificate_can_carry_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CertificateError, match="no name that a certificate can carry"):
        open_authority(tmp_path).leaf(name, ["192.0.2.7"])


def test_a_target_without_a_name_is_known_by_its_addresses(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    handshake(tmp_path, authority.leaf("", ["192.0.2.7"]).pem, tmp_path / "ca" / "ca.pem", "192.0.2.7")
    handshake(tmp_path, authority.leaf("192.0.2.9", []).pem, tmp_path / "ca" / "ca.pem", "192.0.2.9")
    with pytest.raises(CertificateError, match="needs a name or an address"):
        authority.leaf("", [])
    with pytest.raises(CertificateError, match="no certificate for"):
        authority.leaf("db", ["nowhere"])


def test_a_broken_authority_is_told_and_not_replaced(tmp_path: Path) -> None:
    open_authority(tmp_path)
    key, certificate = tmp_path / "ca" / "ca.key", tmp_path / "ca" / "ca.pem"
    good_key, good_certificate = key.read_bytes(), certificate.read_bytes()

    def failure() -> str:
        with pytest.raises(CertificateError) as raised:
            open_authority(tmp_path)
        return str(raised.value)

    certificate.write_bytes(good_certificate[:200])
    assert "cannot be parsed" in failure()
    certificate.unlink()
    assert "No such file or directory" in failure()
    certificate.write_bytes(good_certificate)
    key.write_bytes(b"")
    assert "cannot be parsed" in failure()
    open_authority(tmp_path / "other")
    key.write_bytes((tmp_path / "other" / "ca" / "ca.key").read_bytes())
    assert "is not the key of" in failure()
    key.write_bytes(good_key)
    os.chmod(key, 0o640)
    assert "chmod 600" in failure()
    os.chmod(key, 0o600)
    open_authority(tmp_path)
    assert certificate.read_bytes() == good_certificate
