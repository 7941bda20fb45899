"""Where the attacks run, and the witnesses that say what came of them.

    namespace runner (hooked cgroup, rules)                    namespace database
        attackers ---redirect--> hopgate --- wire --- [witness] ---> PostgreSQL

The database takes user `intruder` from anywhere and without a password, so whatever gets to it gets in; the gateway's
own role needs one that only the gateway has. Witnesses:

    a packet socket on the database's end of the wire   every SYN, datagram and fragment that arrives; at the ports
                                                        where agents are intercepted, what holds more than the
                                                        beginning of a login: there connections are made
    PostgreSQL's log                                    which user logged in from which source port, and every statement
    the gateway's index, recordings and log             what came to the proxy, and what was said about it

What arrived is the proxy's own only if its source port logged in as the gateway's role. Agents of the policy: `attack`,
which may do nothing; `dba`, which may read, as user DBA only; `clerk` and `guest`, which may read, told by an argument
and by a declaration; `spy`, which may do nothing and is intercepted. `tool` is the same program and no agent.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from hostagent.control.rows import SessionRow, SessionState
from hostagent.control.store import opened
from hostagent.settings import load
from proxy.recording import read
from proxy.recording.records import Login, Ruled
from tests.lab.cgroups import cgroup, inside
from tests.lab.hopgate import Gateway, gateway
from tests.lab.namespaces import entered, ip, linked_namespaces, namespace, sysctl
from tests.lab.postgres import PostgresServer, postgres

SOURCE = Path(__file__).with_name("attack.c")
RUNNER = ("192.0.2.1", "2001:db8::1")
DATABASE = ("192.0.2.10", "2001:db8::10")
UNLISTED = "192.0.2.11"
"""Another address of the database, which is no target's."""
PORT = 5432
UPLINK = ("198.51.100.1", "198.51.100.10")
"""A wire of its own between some namespace and the database: its two ends."""
FREE_PORT, PROTECTED_PORT = 6000, 6001
"""Other ports of the database: one that the policy says nothing about, and one that it protects."""
ROLE = "shop_app"
ATTACKER, DBA = 61001, 61002
HIDDEN_PORTS = range(6010, 6030)
"""Ports of the database that the policy does not name either; one for each attack, since the same alert again is only
counted."""
SINK_PORT = 6030
"""Takes connections, and reads nothing."""
AUDIT_BYTES = 64 * 1024 * 1024

_PROGRAMS = ("attack", "tool", "dba", "clerk", "spy")
_PACKET_OUTGOING = 4
_SYN, _ACK = 0x02, 0x10
_BEGINNING = 8
"""Bytes of a login that say nothing yet."""
_SETTLE_S = 0.06
_CLOSED_TIMEOUT_S = 5.0

LESS = "bpf,perfmon,net_admin,sys_admin,sys_module,sys_rawio,sys_boot,sys_ptrace"
"""What a root agent has to be without."""

POLICY = """
agents:
  attack: {{exe: {attack}}}
  dba: {{exe: {dba}, uid: {dba_uid}}}
  clerk: {{exe: {clerk}, argv: "*clerks-work*"}}
  guest: {{declared_by: "uid:{attacker_uid}"}}
  spy: {{exe: {spy}, intercept: all}}
targets:
  shop:
    protocol: postgresql
    addresses: ["{four}:{port}", "[{six}]:{port}"]
    credential: shop
    tls: {{mode: disable}}
protect: {{{protected}: postgresql}}
rules:
  - name: they-read
    agents: [dba, clerk, guest]
    targets: shop
    statements: read
    relations: "public.*"
    decision: allow
"""


@dataclass(frozen=True)
class Arrival:
    """One packet at the database that begins something: a SYN, a datagram, or the head or tail of a
    fragmented one (ports 0)."""

    kind: str
    source: str
    source_port: int
    dest: str
    port: int


@dataclass
class Seen:
    """What came of one attack. `arrived` is what reached the database unproxied; `answered` are the chains for which
    the gateway let the statement pass; `denied` counts sessions that were refused or lost a login or a statement."""

    said: list[str] = field(default_factory=list)
    arrived: list[Arrival] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    sessions: list[SessionRow] = field(default_factory=list)
    denied: int = 0
    alerts: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """`stolen` (somebody else's bytes), `reached`, `answered as CHAIN`, `denied and recorded (CHAIN)` or `closed`;
        and whether there was an alert."""
        who = "; ".join(dict.fromkeys(row.chain or "nobody known" for row in self.sessions))
        if any(line.startswith("stolen") for line in self.said):
            word = "stolen"
        elif self.arrived:
            word = "reached"
        elif self.answered:
            word = f"answered as {self.answered[0]}"
        elif self.sessions and self.denied == len(self.sessions):
            word = f"denied and recorded ({who})"
        elif self.sessions:
            word = f"not denied: nothing was asked ({who})"
        else:
            word = "closed"
        return f"{word}, alerted" if self.alerts else word


class Witness:
    """Keeps what arrives at the database's end of the wire."""

    def __init__(self, netns: str) -> None:
        with entered(netns):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        self._socket.settimeout(0.2)
        self._arrivals: list[Arrival] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def take(self) -> list[Arrival]:
        taken, self._arrivals = self._arrivals, []
        return taken

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                data, address = self._socket.recvfrom(65536)
            except TimeoutError:
                continue
            if address[2] != _PACKET_OUTGOING:
                arrival = _arrival(address[1], data)
                # forwarders go on from here by the loopback
                if arrival is not None and not arrival.dest.startswith("127."):
                    self._arrivals.append(arrival)


def _arrival(protocol: int, data: bytes) -> Arrival | None:
    if protocol == 0x0800 and len(data) >= 20:
        start, kind = (data[0] & 15) * 4, data[9]
        source, dest = (socket.inet_ntop(socket.AF_INET, data[at : at + 4]) for at in (12, 16))
        fragment = struct.unpack_from("!H", data, 6)[0]
        if fragment & 0x3FFF:
            return Arrival("tail" if fragment & 0x1FFF else "head", source, 0, dest, 0)
    elif protocol == 0x86DD and len(data) >= 40:
        start, kind = 40, data[6]
        source, dest = (socket.inet_ntop(socket.AF_INET6, data[at : at + 16]) for at in (8, 24))
    else:
        return None
    if kind == socket.IPPROTO_UDP and len(data) >= start + 8:
        return Arrival(
            "datagram", source, *struct.unpack_from("!H", data, start), dest, *struct.unpack_from("!H", data, start + 2)
        )
    if kind != socket.IPPROTO_TCP or len(data) < start + 20:
        return None
    source_port, port = struct.unpack_from("!HH", data, start)
    if port in HIDDEN_PORTS or port == SINK_PORT:
        size = struct.unpack_from("!H", data, 2)[0] if protocol == 0x0800 else 40 + struct.unpack_from("!H", data, 4)[0]
        more = size - start - (data[start + 12] >> 4) * 4 > _BEGINNING
        return Arrival("data", source, source_port, dest, port) if more else None
    if data[start + 13] & (_SYN | _ACK) == _SYN:
        return Arrival("SYN", source, source_port, dest, port)
    return None


class Bed:
    """`attack`, `tool`, `dba`, … are paths of the program; `work` is the attacker's own directory."""

    def __init__(self, server: PostgresServer, running: Gateway, directory: Path, runner: str, database: str) -> None:
        self._early: dict[str, subprocess.Popen[str]] = {}
        self.server = server
        self.gateway = running
        self.directory = directory
        self.runner = runner
        self.database = database
        self.work = directory / "work"
        self.attack, self.tool, self.dba, self.clerk, self.spy = (directory / "bin" / name for name in _PROGRAMS)
        self.token = ""
        self.escaped = Seen()
        """Of an attack from a namespace with an uplink, at the beginning: what is said of it takes half a minute."""
        self._witness = Witness(database)
        self._known: set[str] = set()
        self._log_at = self._server_log_at = 0

    def close(self) -> None:
        self._witness.close()

    @property
    def listen_port(self) -> int:
        return load(self.gateway.config).listen_port

    def workers(self) -> list[int]:
        assert self.gateway.process is not None
        pid = self.gateway.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def early(self, state: str) -> list[str]:
        """Tells the attacker that has waited since before the gateway's start to go on; what it says."""
        return self._early[state].communicate(f"{self.token}\n", timeout=20)[0].splitlines()

    # --- attacks ------------------------------------------------------------------------------------------------------

    def command(
        self,
        way: str,
        *arguments: object,
        program: Path | None = None,
        uid: int = ATTACKER,
        without: str = "",
        address: str = DATABASE[0],
        port: int = PORT,
        above: Sequence[str] = (),
    ) -> list[str]:
        """The command of an attacker. `without` are capabilities that root has not; `above` is what starts it."""
        become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else ["setpriv"]
        if without:
            gone = ",".join(f"-{name}" for name in without.split(","))
            become += [f"--bounding-set={gone}", f"--inh-caps={gone}"]
        words = [str(program or self.attack), way, address, str(port), self.token, *map(str, arguments)]
        return [*become, *above, *words]

    def run(
        self,
        command: Sequence[str],
        *,
        group: str = "jobs",
        netns: str | None = None,
        timeout_s: float = 30,
        outside: bool = False,
    ) -> list[str]:
        """Runs an attacker in the hooked cgroup (or `outside`) and the runner's namespace; what it printed."""
        where = None if outside else self._group(group)
        done = subprocess.run(
            inside(command, cgroup=where, netns=netns or self.runner),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            cwd=self.work,
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        )
        return done.stdout.splitlines()

    @contextmanager
    def started(
        self,
        command: Sequence[str],
        *,
        group: str = "jobs",
        netns: str | None = None,
        env: dict[str, str] | None = None,
        ready: bool = True,
    ) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """A process of the lab within the block, and the first line that it says; ended afterwards."""
        process = subprocess.Popen(
            inside(command, cgroup=self._group(group), netns=netns or self.runner),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.work,
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", **(env or {})},
        )
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip() if ready else ""
        finally:
            process.kill()
            process.communicate()

    def _group(self, name: str) -> Path:
        directory = self.gateway.cgroup / name
        directory.mkdir(exist_ok=True)
        return directory

    @contextmanager
    def silenced(self, source_port: int) -> Iterator[None]:
        """The runner's kernel does not reset what it knows no socket of."""
        rule = ["OUTPUT", "-p", "tcp", "--tcp-flags", "RST", "RST", "--sport", str(source_port), "-j", "DROP"]
        self.iptables("-A", *rule)
        try:
            yield
        finally:
            self.iptables("-D", *rule)

    def iptables(self, *arguments: str) -> None:
        subprocess.run(["nsenter", f"--net=/run/netns/{self.runner}", "iptables", "-w", *arguments], check=True)

    # --- witnesses ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """What was seen up to now is forgotten; there is a new token."""
        self.token = f"token-{secrets.token_hex(6)}"
        time.sleep(0.01)
        self._witness.take()
        self._known = {row.id for row in self._rows()}
        self._log_at = len(self.gateway.log())
        self._server_log_at = len(self.server.log())

    def end(self, said: list[str]) -> Seen:
        """What the witnesses saw since `begin`, once the gateway has closed what it had to do with it."""
        time.sleep(_SETTLE_S)
        deadline = time.monotonic() + _CLOSED_TIMEOUT_S
        while any(row.state is SessionState.OPEN for row in self._new()) and time.monotonic() < deadline:
            time.sleep(0.05)
        log = self.server.log()[self._server_log_at :]
        own = {int(found) for found in re.findall(rf"{ROLE} \S+\((\d+)\) LOG:  connection authorized", log)}
        seen = Seen(said=said, sessions=self._new())
        arrived = [one for one in self._witness.take() if one.source_port not in own]
        fragments = {one.kind for one in arrived if not one.port}
        # one half of a segment without the other is nothing to a server
        seen.arrived = [one for one in arrived if one.port or len(fragments) == 2]
        for row in seen.sessions:
            denied, passed = self._ruled(row)
            seen.denied += denied
            if passed:
                seen.answered.append(row.chain or "unattributed")
        for line in log.splitlines():
            if self.token in line and "statement:" in line and f" {ROLE} " not in line and not seen.arrived:
                seen.arrived.append(Arrival("statement", line, 0, DATABASE[0], PORT))
        seen.alerts = self.alerts()
        return seen

    def alerts(self) -> list[str]:
        """Those since `begin`. Of connections past the proxy it is told late: those are of another attack."""
        return [
            line
            for line in self.gateway.log()[self._log_at :].splitlines()
            if '"event": "alert"' in line and "went past the proxy" not in line
        ]

    def _ruled(self, row: SessionRow) -> tuple[bool, bool]:
        """Whether the recording of this session has a denial; and whether the token got through."""
        denied, passed = bool(row.refusal), False
        for entry in read(self.gateway.state_dir / "recordings" / row.recording, row.id):
            record = entry.record
            if isinstance(record, Login | Ruled):
                denied |= record.decision == "deny"
            if isinstance(record, Ruled):
                passed |= record.decision == "allow" and self.token in str(record)
        return denied, passed

    def _new(self) -> list[SessionRow]:
        return [row for row in self._rows() if row.id not in self._known]

    def _rows(self) -> list[SessionRow]:
        with opened(self.gateway.state_dir / "control.sqlite") as store:
            return store.sessions(limit=200)


def compile_attack(directory: Path) -> None:
    """The program under its three names. Raises `subprocess.CalledProcessError`."""
    directory.mkdir()
    built = directory / "attack"
    subprocess.run(
        ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers", "-o", built, SOURCE],
        check=True,
    )
    for name in _PROGRAMS[1:]:
        shutil.copy(built, directory / name)


@contextmanager
def opened_bed() -> Iterator[Bed]:
    """Everything runs, and goes away afterwards. Needs root."""
    password = secrets.token_hex(16)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hopgate-bypass-")))
        directory.chmod(0o711)
        compile_attack(directory / "bin")
        (directory / "work").mkdir()
        os.chown(directory / "work", ATTACKER, ATTACKER)
        runner, database = stack.enter_context(linked_namespaces(RUNNER, (*DATABASE, UNLISTED)))
        server = stack.enter_context(
            postgres(
                address=DATABASE[0],
                namespace=database,
                tls=False,
                settings={
                    "listen_addresses": "*",
                    "log_connections": "on",
                    "log_statement": "all",
                    "log_line_prefix": "%p %u %r ",
                },
            )
        )
        server.run_sql(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{password}'; CREATE ROLE intruder LOGIN SUPERUSER")
        server.run_sql(f"CREATE DATABASE shop OWNER {ROLE}")
        server.run_sql(
            f"SET ROLE {ROLE}; CREATE TABLE customers (name text); INSERT INTO customers VALUES ('x')", database="shop"
        )
        server.set_auth(f"host all {ROLE} all scram-sha-256\nhost all all all trust")
        for port in (FREE_PORT, PROTECTED_PORT):
            stack.enter_context(_forwarder(database, port, "127.0.0.1", PORT))
        for iptables in ("iptables", "ip6tables"):
            hidden = f"{HIDDEN_PORTS.start}:{HIDDEN_PORTS.stop - 1}"
            redirect = ["PREROUTING", "-p", "tcp", "--dport", hidden, "-j", "REDIRECT", "--to-ports", str(FREE_PORT)]
            subprocess.run(
                ["nsenter", f"--net=/run/netns/{database}", iptables, "-t", "nat", "-A", *redirect], check=True
            )
        stack.enter_context(_sink(database))
        hooked = stack.enter_context(cgroup("bypass"))
        running = stack.enter_context(gateway(directory / "gateway", namespace=runner, cgroup=hooked))
        stack.enter_context(_small_disk(running.state_dir))
        running.write_policy(
            POLICY.format(
                attack=directory / "bin" / "attack",
                dba=directory / "bin" / "dba",
                clerk=directory / "bin" / "clerk",
                spy=directory / "bin" / "spy",
                dba_uid=DBA,
                attacker_uid=ATTACKER,
                four=DATABASE[0],
                six=DATABASE[1],
                port=PORT,
                protected=PROTECTED_PORT,
            )
        )
        running.write_credential("shop", ROLE, password)
        # as security groups and stateful firewalls do: what belongs to no connection is dropped, and not reset
        for iptables in ("iptables", "ip6tables"):
            drop = ["-A", "INPUT", "-i", "wire", "-p", "tcp", "!", "--syn", "-m", "conntrack", "--ctstate", "NEW"]
            subprocess.run(["nsenter", f"--net=/run/netns/{database}", iptables, *drop, "-j", "DROP"], check=True)
        made = Bed(server, running, directory, runner, database)
        stack.callback(made.close)
        for state in ("made", "connected"):
            made.token = "early"
            process, said = stack.enter_context(made.started(made.command("early", state)))
            if said != "ready":
                raise RuntimeError(f"the early attacker does not come up: {said}")
            made._early[state] = process
        running.start()
        # fast open without a cookie: the very first SYN carries data
        sysctl(runner, "net.ipv4.tcp_fastopen", "5")
        # what the kernel of a runner waits for a minute is waited for a second here
        sysctl(runner, "net.netfilter.nf_conntrack_tcp_timeout_close_wait", "1")
        sysctl(runner, "net.netfilter.nf_conntrack_tcp_timeout_close", "1")
        with uplink(database) as netns:
            made.begin()
            made.escaped = made.end(made.run(made.command("plain", address=UPLINK[1]), netns=netns))
        yield made


@contextmanager
def uplink(database: str) -> Iterator[str]:
    """A namespace with a wire of its own to the database."""
    with namespace() as netns:
        ip("link", "add", "uplink", "netns", netns, "type", "veth", "peer", "name", "uplink", "netns", database)
        for end, address in ((netns, UPLINK[0]), (database, UPLINK[1])):
            ip("-n", end, "address", "add", f"{address}/24", "dev", "uplink")
            ip("-n", end, "link", "set", "uplink", "up")
        yield netns


@contextmanager
def _forwarder(netns: str, port: int, address: str, to: int) -> Iterator[None]:
    """Whatever comes to that port of the namespace goes to the address."""
    listen = f"TCP6-LISTEN:{port},fork,reuseaddr,ipv6only=0"
    process = subprocess.Popen(inside(["socat", listen, f"TCP:{address}:{to}"], netns=netns))
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def _sink(netns: str) -> Iterator[None]:
    with entered(netns):
        listener = socket.create_server(("::", SINK_PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)

    def serve() -> None:
        with suppress(OSError):
            while True:
                listener.accept()[0].close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@contextmanager
def _small_disk(directory: Path) -> Iterator[None]:
    directory.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={AUDIT_BYTES},mode=0755", "hopgate-bypass", directory], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
