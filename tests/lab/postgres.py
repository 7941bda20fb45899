"""A PostgreSQL server of Debian's own, for tests, the demo and the benches: a cluster made for one use, and gone
after it.

    with postgres(auth="scram-sha-256") as server:
        server.run_sql("CREATE TABLE t (a int)")

States: files made -> initdb -> started -> ready -> stopped and removed. Everything lies in a temporary directory
that belongs to the `postgres` user, since the server refuses to be root. It listens on the given address only,
never on a Unix socket outside its directory.

Blind spot: with `namespace` the address has to exist there already.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
SERVER_NAME = "db.hopgate.test"
"""The name that the server's certificate carries."""


class LabError(Exception):
    """A server of the laboratory did not start or did not take its SQL; the message holds what it said."""


@dataclass(frozen=True)
class Authority:
    """A certificate authority made for one use."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def make_authority(common: str) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(common))
        .issuer_name(_name(common))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=30))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(key, certificate)


def issue(
    authority: Authority, name: str, addresses: tuple[str, ...] = (), *, expired: bool = False
) -> tuple[bytes, bytes]:
    """A server certificate and its key, both PEM. An expired one ended yesterday."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    end = now - datetime.timedelta(days=1) if expired else now + datetime.timedelta(days=20)
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=20))
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


@dataclass(frozen=True)
class PostgresServer:
    """A server that is up. `ca_path` is the root of its certificate, `other_ca_path` one that did not sign it; both
    exist also without TLS. `superuser` comes in with `superuser_password` over the network, like everybody."""

    host: str
    port: int
    ca_path: Path
    other_ca_path: Path
    server_name: str
    superuser: str
    superuser_password: str = field(repr=False)
    directory: Path
    binaries: Path
    pid: int
    namespace: str | None

    def run_sql(self, sql: str, database: str = "postgres") -> str:
        """Runs statements as the superuser, each in a transaction of its own, over the server's own socket; the
        rows come back unaligned. Raises `LabError`."""
        done = subprocess.run(
            [
                self.binaries / "psql",
                *("-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"),
                *("-h", self.directory, "-p", str(self.port), "-U", self.superuser, "-d", database, "-f", "-"),
            ],
            input=sql,
            capture_output=True,
            text=True,
            timeout=60,
            env={"PGPASSWORD": self.superuser_password, "PATH": os.environ["PATH"]},
            check=False,
        )
        if done.returncode:
            raise LabError(f"psql: {done.stderr.strip()}")
        return done.stdout

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def set_auth(self, lines: str) -> None:
        """Replaces pg_hba.conf's lines for the network, and waits until the server uses them."""
        (self.directory / "data" / "pg_hba.conf").write_text(f"local all all trust\n{lines}\n")
        self.run_sql("SELECT pg_reload_conf()")
        time.sleep(0.2)


def find_binaries() -> Path:
    """The newest installed server's programs. Raises `LabError`."""
    found = sorted(
        (path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")),
        key=lambda path: int(path.parent.name),
    )
    if not found:
        raise LabError("no PostgreSQL server under `/usr/lib/postgresql`: install the package `postgresql`")
    return found[-1]


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago, in this network namespace."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def postgres(
    *,
    address: str = "127.0.0.1",
    port: int = 0,
    auth: str = "scram-sha-256",
    tls: bool = True,
    expired: bool = False,
    server_name: str = SERVER_NAME,
    superuser: str = "postgres",
    superuser_password: str = "",
    namespace: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[PostgresServer]:
    """Starts a server on `address` and `port` (0: a free one, or 5432 in a `namespace`, a network namespace's name)
    and ends it.

    `auth` is pg_hba's method for the network (`scram-sha-256`, `md5`, `password`, `trust`, …). With `tls` the
    server offers TLS; that it insists is for `set_auth` (`hostssl`). `expired` gives it a certificate that ended
    yesterday. Raises `LabError`.
    """
    binaries = find_binaries()
    account = pwd.getpwnam("postgres")
    password = superuser_password or secrets.token_urlsafe(12)
    port = port or (free_port(address) if namespace is None else 5432)
    directory = Path(tempfile.mkdtemp(prefix="hopgate-postgres-"))
    process: subprocess.Popen[bytes] | None = None
    try:
        authority, other = make_authority("hopgate test root"), make_authority("another test root")
        certificate, key = issue(authority, server_name, (address,), expired=expired)
        for name, content in (
            ("ca.pem", authority.pem),
            ("other-ca.pem", other.pem),
            ("server.pem", certificate),
            ("server.key", key),
            ("password", password.encode()),
        ):
            (directory / name).write_bytes(content)
            (directory / name).chmod(0o600 if name in ("server.key", "password") else 0o644)
        for path in (directory, *directory.iterdir()):
            os.chown(path, account.pw_uid, account.pw_gid)
        directory.chmod(0o755)
        data = directory / "data"
        _run_as(
            account,
            [
                *(binaries / "initdb", "-D", data, "-U", superuser, "--pwfile", directory / "password"),
                *("--auth-local=trust", "--auth-host=reject", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"),
            ],
            directory,
        )
        (directory / "password").unlink()
        encryption = "md5" if auth == "md5" else "scram-sha-256"
        (data / "pg_hba.conf").write_text(f"local all all trust\nhost all all all {auth}\n")
        configuration = {
            "listen_addresses": address,
            "port": str(port),
            "unix_socket_directories": str(directory),
            "password_encryption": encryption,
            "fsync": "off",
            "synchronous_commit": "off",
            "max_connections": "60",
            "shared_buffers": "32MB",
            "log_destination": "stderr",
            "ssl": "on" if tls else "off",
            "ssl_cert_file": str(directory / "server.pem"),
            "ssl_key_file": str(directory / "server.key"),
            **(settings or {}),
        }
        (data / "postgresql.auto.conf").write_text(
            "".join(f"{name} = '{value}'\n" for name, value in configuration.items())
        )
        command = _as_account(account, [binaries / "postgres", "-D", data], dies_with_parent=True)
        if namespace is not None:
            command = ["ip", "netns", "exec", namespace, *command]
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=directory, start_new_session=True
            )
        server = PostgresServer(
            host=address,
            port=port,
            ca_path=directory / "ca.pem",
            other_ca_path=directory / "other-ca.pem",
            server_name=server_name,
            superuser=superuser,
            superuser_password=password,
            directory=directory,
            binaries=binaries,
            pid=process.pid,
            namespace=namespace,
        )
        _await_ready(server, process)
        if encryption == "md5":
            server.run_sql(f"SET password_encryption = 'md5'; ALTER ROLE \"{superuser}\" PASSWORD '{password}'")
        yield server
    finally:
        if process is not None:
            _stop(process)
        shutil.rmtree(directory, ignore_errors=True)


def _as_account(account: pwd.struct_passwd, command: list[str | Path], *, dies_with_parent: bool = False) -> list[str]:
    """The command as that user; `dies_with_parent` also ends it when whoever started it was killed."""
    words = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    if os.geteuid() == account.pw_uid:
        words = []
    if dies_with_parent:
        words += ["--pdeathsig", "QUIT"]
    return ["setpriv", *words, *map(str, command)] if words else [str(word) for word in command]


def _run_as(account: pwd.struct_passwd, command: list[str | Path], directory: Path) -> None:
    done = subprocess.run(
        _as_account(account, command),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        cwd=directory,
        check=False,
    )
    if done.returncode:
        raise LabError(f"`{Path(command[0]).name}`: {done.stderr.strip() or done.stdout.strip()}")


def _await_ready(server: PostgresServer, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            server.run_sql("SELECT 1")
            return
        except LabError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"the server did not start: {error}\n{server.log()}") from None
        time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Immediate shutdown; then, after the deadline, the whole process group."""
    if process.poll() is None:
        process.send_signal(signal.SIGQUIT)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_TIMEOUT_S)
