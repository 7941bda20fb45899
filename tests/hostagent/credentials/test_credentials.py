"""Credentials: found, checked, re-read, and never told to anybody who did not ask."""

from __future__ import annotations

import os
import stat
import traceback
from pathlib import Path

import pytest
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
        files.credential(name)
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    return str(raised.value)


def test_a_credential_is_read_and_not_shown(tmp_path: Path) -> None:
    write(tmp_path, f"user: app\npassword: {SECRET}\n")
    credential = CredentialFiles(tmp_path).credential("orders")
    assert credential == Credential("app", SECRET)
    assert SECRET not in repr(credential)
    assert SECRET not in f"{credential}"


@pytest.mark.parametrize("password", ["12345", "null", "true", "'with \"quotes\"'", "1e3"])
def test_a_password_is_text_whatever_it_looks_like(tmp_path: Path, password: str) -> None:
    write(tmp_path, f"user: 7\npassword: {password}\n")
    assert CredentialFiles(tmp_path).credential("orders") == Credential("7", password.strip("'"))


def test_a_changed_file_counts_at_once(tmp_path: Path) -> None:
    files = CredentialFiles(tmp_path)
    write(tmp_path, "user: app\npassword: one\n")
    assert files.credential("orders").password == "one"
    write(tmp_path, "user: app\npassword: two\n")
    assert files.credential("orders").password == "two"
    (tmp_path / "orders").unlink()
    assert "No such file" in refused(files)


def test_under_systemd_the_file_carries_the_prefix(tmp_path: Path) -> None:
    write(tmp_path, "user: app\npassword: one\n", "credential_orders")
    files = CredentialFiles(environ={"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert files.credential("orders").user == "app"
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
        f"user: app\npassword: {SECRET}" + " " * 20_000,
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
        CredentialFiles(tmp_path).credential("orders")
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
