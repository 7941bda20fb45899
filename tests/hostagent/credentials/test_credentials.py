"""Credentials: found, checked, re-read, and never told to anybody who did not ask."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import stat
import traceback
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostagent.credentials import Credential, CredentialFiles, CredentialUnavailable, mask_key
from hostagent.credentials.keys import KeyUnavailable

SECRET = "hunter2-hunter2"


def write(directory: Path, text: str | bytes, name: str = "orders", mode: int = 0o600) -> Path:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def refused(files: CredentialFiles, name: str = "orders") -> str:
    with pytest.raises(CredentialUnavailable) as raised:
        files.read(name)
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    return str(raised.value)


def test_a_credential_is_read_and_not_shown(tmp_path: Path) -> None:
    write(tmp_path, f"user: app\npassword: {SECRET}\n")
    credential = CredentialFiles(tmp_path).read("orders")
    assert credential == Credential("app", SECRET)
    assert SECRET not in repr(credential)
    assert SECRET not in f"{credential}"


@pytest.mark.parametrize("password", ["12345", "null", "true", "'with \"quotes\"'", "1e3"])
def test_a_password_is_text_whatever_it_looks_like(tmp_path: Path, password: str) -> None:
    write(tmp_path, f"user: 7\npassword: {password}\n")
    assert CredentialFiles(tmp_path).read("orders") == Credential("7", password.strip("'"))


def test_a_changed_file_counts_at_once(tmp_path: Path) -> None:
    files = CredentialFiles(tmp_path)
    write(tmp_path, "user: app\npassword: one\n")
    assert files.read("orders").password == "one"
    write(tmp_path, "user: app\npassword: two\n")
    assert files.read("orders").password == "two"
    (tmp_path / "orders").unlink()
    assert "No such file" in refused(files)


def test_under_systemd_the_file_carries_the_prefix(tmp_path: Path) -> None:
    write(tmp_path, "user: app\npassword: one\n", "credential_orders")
    files = CredentialFiles(environ={"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert files.read("orders").user == "app"
    assert CredentialFiles(environ={}).directory == Path("/etc/hopgate/credentials")
    assert CredentialFiles(tmp_path, environ={"CREDENTIALS_DIRECTORY": "/x"}).directory == tmp_path


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../orders", "a/b", "/etc/passwd", ".hidden", "a\0b", "a" * 200, "a\n"]
)
def test_a_name_cannot_leave_the_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path, f"user: app\npassword: {SECRET}\n")
    assert "is no name of a credential" in refused(CredentialFiles(tmp_path / "inner"), name)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path, f"user: app\npassword: {SECRET}\n", mode=mode)
    assert f"`chmod 600 {path}`" in refused(CredentialFiles(tmp_path))


def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, f"user: app\npassword: {SECRET}\n")
    os.chown(path, 65534, 65534)
    assert f"`chown root {path}`" in refused(CredentialFiles(tmp_path))


def test_what_is_no_file_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "orders", 0o600)
    assert "no regular file" in refused(CredentialFiles(tmp_path))
    (tmp_path / "other").mkdir(mode=0o700)
    assert "no regular file" in refused(CredentialFiles(tmp_path), "other")


@pytest.mark.parametrize(
    "text",
    [
        "",
        SECRET,
        f"- {SECRET}\n",
        f"user: app\nsecret: {SECRET}\n",
        f"user: app\npassword: {SECRET}\nmore: 1\n",
        f"user: app\npassword: {SECRET}\npassword: {SECRET}\n",
        f"user: app\npassword: [{SECRET}]\n",
        f"user: ''\npassword: {SECRET}\n",
        f"user: app\npassword: *{SECRET}\n",
        f"user: app\npassword: '{SECRET}\n",
        f"user: app\n\tpassword: {SECRET}\n",
        f"user: app\npassword: {SECRET}\n---\nuser: {SECRET}\n",
        f"{SECRET}: app\npassword: x\n",
        f"user: app\npassword: !!python/name:{SECRET} x\n? {SECRET}\n",
        f"user: app\npassword: {SECRET}\x07\n",
        SECRET.encode() + b"\xff\xfe\x00",
        f"user: app\npassword: {SECRET}" + " " * 70_000,
        "[" * 16_000,
        f"&{SECRET} user: app\n[{SECRET}]: x\n",
    ],
)
def test_no_error_tells_what_is_in_the_file(tmp_path: Path, text: str | bytes) -> None:
    path = write(tmp_path, text)
    assert str(path) in refused(CredentialFiles(tmp_path))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_arbitrary_content_is_a_credential_or_refused(tmp_path: Path, data: bytes) -> None:
    write(tmp_path, data)
    try:
        CredentialFiles(tmp_path).read("orders")
    except CredentialUnavailable as error:
        assert error.__cause__ is None


def test_the_mask_key_is_made_once_for_root_only(tmp_path: Path) -> None:
    key = mask_key(tmp_path / "state")
    assert len(key) == 32
    assert mask_key(tmp_path / "state") == key
    path = tmp_path / "state" / "mask.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["mask.key"]
    path.chmod(0o644)
    with pytest.raises(KeyUnavailable, match="chmod 600"):
        mask_key(tmp_path / "state")
    path.chmod(0o600)
    path.write_bytes(key[:31])
    with pytest.raises(KeyUnavailable, match="has not `32` bytes"):
        mask_key(tmp_path / "state")


# --- for API servers --------------------------------------------------------------------------------------------------


def pem() -> tuple[str, str]:
    """A key and a certificate of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private.decode(), certificate.public_bytes(encoding).decode()


def test_a_token_and_one_that_somebody_rotates(tmp_path: Path) -> None:
    files = CredentialFiles(tmp_path)
    write(tmp_path, f"token: {SECRET}\n")
    assert files.read("orders") == Credential(password=SECRET)
    rotated = write(tmp_path, "one\n", "token.txt")
    write(tmp_path, f"token_file: {rotated}\n", "rotated")
    assert files.read("rotated") == Credential(password="one")
    write(tmp_path, "two\n", "token.txt")
    assert files.read("rotated") == Credential(password="two")
    write(tmp_path, f"{SECRET} with a space\n", "token.txt")
    assert "holds no token" in refused(files, "rotated")
    write(tmp_path, "one\n", "token.txt", mode=0o644)
    assert "mode `0644`" in refused(files, "rotated")
    write(tmp_path, "token_file: relative\n", "rotated")
    assert "not an absolute path" in refused(files, "rotated")
    write(tmp_path, "in_cluster: true\n", "pod")
    assert "/var/run/secrets/kubernetes.io/serviceaccount/token" in refused(files, "pod")


def test_the_service_accounts_token_is_as_the_kubelet_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a file that everybody in the pod can read, replaced as a whole when it is rotated."""
    volume = tmp_path / "serviceaccount"
    for number in (1, 2):
        (volume / f"..{number}").mkdir(parents=True)
        write(volume / f"..{number}", f"token-{number}", "token", mode=0o644)
    (volume / "..data").symlink_to("..1")
    (volume / "token").symlink_to("..data/token")
    monkeypatch.setattr("hostagent.credentials.files.IN_CLUSTER", volume / "token")
    files = CredentialFiles(tmp_path)
    write(tmp_path, "in_cluster: true\n", "pod")
    assert files.read("pod") == Credential(password="token-1")
    (volume / "..new").symlink_to("..2")
    (volume / "..new").rename(volume / "..data")
    assert files.read("pod") == Credential(password="token-2")
    write(volume / "..2", "token-2", "token", mode=0o640)
    assert files.read("pod") == Credential(password="token-2")
    write(volume / "..2", "token-2", "token", mode=0o664)
    assert "mode `0664`" in refused(files, "pod")


def test_a_client_certificate(tmp_path: Path) -> None:
    key, chain = pem()
    write(tmp_path, key, "client.key")
    write(tmp_path, chain, "client.pem")
    write(tmp_path, f"client_certificate: {tmp_path}/client.pem\nclient_key: {tmp_path}/client.key\n")
    credential = CredentialFiles(tmp_path).read("orders")
    assert isinstance(credential, Credential)
    assert credential.certificate == f"{key}\n{chain}".encode()
    assert "PRIVATE" not in repr(credential)
    write(tmp_path, chain, "client.key")
    assert "holds no PEM private key" in refused(CredentialFiles(tmp_path))


PLUGIN = """#!/bin/sh
echo call >>{calls}
[ "$1" = get ] && [ "$WHO" = us ] && [ -z "$HOME" ] || exit 3
case "$KUBERNETES_EXEC_INFO" in *'"interactive":false'*) ;; *) exit 4 ;; esac
cat {answer}
"""


def plugin(tmp_path: Path, answer: object) -> tuple[CredentialFiles, Path]:
    """The source, and the file that has a line for each call."""
    calls, told = tmp_path / "calls", tmp_path / "answer"
    calls.write_text("")
    told.write_text(answer if isinstance(answer, str) else json.dumps(answer))
    command = tmp_path / "plugin"
    command.write_text(PLUGIN.format(calls=calls, answer=told))
    command.chmod(0o755)
    write(tmp_path, f"exec: {{command: {command}, args: [get], env: {{WHO: us}}}}\n")
    return CredentialFiles(tmp_path), calls


def exec_credential(**status: str) -> dict[str, object]:
    return {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}


def after(**time: float) -> str:
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(**time)).isoformat()


def test_a_plugin_is_asked_again_before_what_it_gave_expires(tmp_path: Path) -> None:
    files, calls = plugin(tmp_path, exec_credential(token=SECRET, expirationTimestamp=after(hours=1)))

    async def ask() -> list[Credential]:
        return await asyncio.gather(*(files.credential("orders") for _ in range(5)))

    assert asyncio.run(ask()) == [Credential(password=SECRET)] * 5
    assert calls.read_text().count("call") == 1
    # within the minute before it expires it is asked again, and what it gave is used while it fails
    files, calls = plugin(tmp_path, exec_credential(token=SECRET, expirationTimestamp=after(seconds=30)))
    assert asyncio.run(ask())[0] == Credential(password=SECRET)
    assert calls.read_text().count("call") == 5
    (tmp_path / "answer").write_text("broken")
    assert asyncio.run(files.credential("orders")) == Credential(password=SECRET)


def test_a_plugin_may_give_a_certificate(tmp_path: Path) -> None:
    key, chain = pem()
    files, _ = plugin(tmp_path, exec_credential(clientCertificateData=chain, clientKeyData=key))
    assert asyncio.run(files.credential("orders")).certificate == f"{key}\n{chain}".encode()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "no ExecCredential"),
        (f'{{"token": "{SECRET}"}}', "no ExecCredential"),
        (exec_credential(), "neither a token nor a client certificate"),
        (exec_credential(token=f"{SECRET} x"), "neither a token"),
        (exec_credential(token=SECRET, expirationTimestamp="2020-01-01T00:00:00Z"), "has expired"),
        (exec_credential(clientCertificateData="x", clientKeyData=SECRET), "no PEM"),
        ({**exec_credential(token=SECRET), "apiVersion": "v2"}, "no ExecCredential of"),
        ("x" * 300_000, "more than"),
    ],
)
def test_a_plugin_that_gives_nothing_usable(tmp_path: Path, answer: object, why: str) -> None:
    files, _ = plugin(tmp_path, answer)
    with pytest.raises(CredentialUnavailable, match=why) as raised:
        asyncio.run(files.credential("orders"))
    assert SECRET not in "".join(traceback.format_exception(raised.value))


def test_a_plugin_that_others_may_change_is_not_run(tmp_path: Path) -> None:
    files, calls = plugin(tmp_path, exec_credential(token=SECRET))
    (tmp_path / "plugin").chmod(0o777)
    with pytest.raises(CredentialUnavailable, match="others cannot write"):
        asyncio.run(files.credential("orders"))
    (tmp_path / "plugin").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "plugin").chmod(0o755)
    with pytest.raises(CredentialUnavailable, match="status `7`"):
        asyncio.run(files.credential("orders"))
    assert calls.read_text() == ""
    write(tmp_path, "exec: {command: relative}\n")
    assert "`exec` has `command`" in refused(files)
