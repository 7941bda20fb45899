"""Direct, PgBouncer and Hopgate side by side in a lab: `scripts/bench` runs it. Needs root, and leaves nothing behind.

    namespace plain (no rules)                                         namespace database
        pgbench ---------------------------- wire --------------------\\
        pgbench --loopback--> pgbouncer ---- wire ---------------------> PostgreSQL
    namespace runner (hooked cgroup, rules)                            /
        pgbench --redirect--> hopgate ------ wire ---------------------

Every workload runs on all routes in turn, in several rounds whose order rotates; a figure is the median of its rounds.
The server asks for SCRAM; PgBouncer (session mode) and Hopgate hold the credential, so their clients give none. Hopgate
attributes, judges and records, as it does in production. The database has several addresses, so that one policy has a
target without TLS, one with TLS, and one with a masked column.

CPU is user and system time of the route's own processes (`/proc/PID/stat`): PgBouncer; workers and host agent.

That routes are what they claim is checked on every run: sessions recorded by Hopgate grow with the clients of its own
route, and with no other.

Blind spots: clients, routes and server share the cores, so a rate tells of the whole machine; the kernel's work for
redirect and hooks is in no process's CPU figure; nothing leaves the machine, so there is no network to wait for.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.lab.bench import samples
from tests.lab.bench.samples import BenchError
from tests.lab.cgroups import cgroup, inside
from tests.lab.hopgate import Gateway, gateway
from tests.lab.namespaces import ip, linked_namespaces, namespace
from tests.lab.postgres import PostgresServer, issue, make_authority, postgres

BULK = Path(__file__).with_name("bulk.py")
RUNNER, PLAIN_TARGET, TLS_TARGET, MASKED_TARGET = "192.0.2.1", "192.0.2.10", "192.0.2.11", "192.0.2.12"
PLAIN, DIRECT_TARGET = "198.51.100.1", "198.51.100.10"
PORT = 5432
POOLER_PORT, POOLER_TLS_PORT = 6432, 6433
DATABASE = USER = "bench"
BULK_ROW = 135
"""Bytes of one DataRow of the large result, about."""
BULK_SQL = "SELECT id, name, card, note FROM bulk"

ROUTES = ("direct", "pgbouncer", "hopgate")

POLICY = """
agents:
  pgbench: {{exe: {pgbench}}}
  bulk: {{exe: {python}, argv: "*bulk.py*"}}
targets:
  plain: {{protocol: postgresql, addresses: {plain}, credential: bench, tls: {{mode: disable}}}}
  secured: {{protocol: postgresql, addresses: {secured}, credential: bench, tls: {{mode: require}}}}
  masked: {{protocol: postgresql, addresses: {masked}, credential: bench, tls: {{mode: disable}}}}
rules:
  - {{name: bench-reads, agents: "*", targets: "*", statements: read, relations: "public.*", decision: allow}}
  - {{name: cards-are-masked, agents: "*", targets: masked, masks: [{{column: public.bulk.card, method: partial}}]}}
"""


@dataclass(frozen=True)
class Workload:
    """`clients` 0 is the large result. `arguments` are pgbench's. `routes` are those that it makes sense for."""

    name: str
    clients: int
    arguments: tuple[str, ...] = ()
    tls: bool = False
    masked: bool = False
    routes: tuple[str, ...] = ROUTES

    @property
    def unit(self) -> str:
        return "MB/s" if not self.clients else "tps"


@dataclass(frozen=True)
class Sample:
    """One run: what was done a second, and CPU microseconds of the route's own processes for each (None: it has
    none)."""

    rate: float
    cpu_us: float | None


@dataclass
class Figures:
    """All runs of one workload on one route."""

    workload: str
    route: str
    unit: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return statistics.median(sample.rate for sample in self.samples)

    @property
    def cpu_us(self) -> float | None:
        spent = [sample.cpu_us for sample in self.samples if sample.cpu_us is not None]
        return statistics.median(spent) if spent else None


@dataclass(frozen=True)
class Route:
    """`enter` puts a command where the route's clients live; `addresses` are where they connect to, by what is asked
    of the connection; `processes` are the ids of what stands between."""

    name: str
    enter: Callable[[Sequence[str]], list[str]]
    address: Callable[[Workload], tuple[str, int]]
    processes: Callable[[], list[int]]
    password: str


WORKLOADS = (
    *(
        Workload(f"pgbench -S {mode} -c {clients}", clients, ("-S", "-M", mode))
        for clients in (1, 8)
        for mode in ("simple", "extended", "prepared")
    ),
    Workload("pgbench -S prepared -c 1, TLS", 1, ("-S", "-M", "prepared"), tls=True),
    Workload("pgbench -S prepared -c 8, TLS", 8, ("-S", "-M", "prepared"), tls=True),
    Workload("connect storm: pgbench -C -S -c 8", 8, ("-C", "-S")),
    Workload("connect storm, TLS", 8, ("-C", "-S"), tls=True),
    Workload("large result", 0),
    Workload("large result, one column masked", 0, masked=True, routes=("direct", "hopgate")),
)


class Bench:
    """The lab, once everything in it runs."""

    def __init__(self, routes: Sequence[Route], running: Gateway, server: PostgresServer, seconds: int) -> None:
        self._routes = {route.name: route for route in routes}
        self._gateway = running
        self._pgbench = str(server.binaries / "pgbench")
        self._seconds = seconds

    def measure(self, workload: Workload, route_name: str) -> Sample:
        """Runs a workload on a route once. Raises `BenchError`."""
        route = self._routes[route_name]
        recorded = self._sessions()
        cpu = samples.cpu_s(route.processes())
        done, took = self._transfer(workload, route) if not workload.clients else self._pgbench_run(workload, route)
        spent = samples.cpu_s(route.processes()) - cpu
        grown = self._sessions() - recorded
        least = max(workload.clients, 1) if route_name == "hopgate" else 0
        if grown < least or (not least and grown):
            raise BenchError(f"`{workload.name}` on `{route_name}`: hopgate recorded `{grown}` sessions")
        return Sample(done / took, spent * 1e6 / done if route.processes() else None)

    def _sessions(self) -> int:
        return sum(1 for _ in (self._gateway.state_dir / "recordings").rglob("*.hgr"))

    def _pgbench_run(self, workload: Workload, route: Route) -> tuple[float, float]:
        host, port = route.address(workload)
        count = str(workload.clients)
        command = [self._pgbench, "-n", *workload.arguments, "-c", count, "-T", str(self._seconds)]
        said = self._run(route, [*command, "-h", host, "-p", str(port), "-U", USER, DATABASE], workload)
        done = re.search(r"transactions actually processed: (\d+)", said)
        rate = re.search(r"^tps = ([\d.]+)", said, re.MULTILINE)
        if done is None or rate is None or not int(done[1]):
            raise BenchError(f"`{workload.name}` on `{route.name}`: pgbench said nothing that counts:\n{said}")
        return int(done[1]), int(done[1]) / float(rate[1])

    def _transfer(self, workload: Workload, route: Route) -> tuple[float, float]:
        host, port = route.address(workload)
        said = self._run(route, [sys.executable, str(BULK), host, str(port), DATABASE, USER, BULK_SQL], workload)
        size, seconds = said.split()
        return int(size) / 1e6, float(seconds)

    def _run(self, route: Route, command: Sequence[str], workload: Workload) -> str:
        done = subprocess.run(
            route.enter(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=self._seconds + 120,
            env={
                "PATH": os.environ["PATH"],
                "PGSSLMODE": "require" if workload.tls else "disable",
                "PGPASSWORD": route.password,
            },
        )
        if done.returncode or "aborted" in done.stderr:
            raise BenchError(f"`{workload.name}` on `{route.name}`: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


@contextmanager
def _pooler(directory: Path, where: str, password: str, *, tls: bool) -> Iterator[int]:
    """PgBouncer in session mode, in the namespace; its process id. It logs in by itself and asks its clients for
    nothing."""
    account = pwd.getpwnam("postgres")
    home = directory / f"pgbouncer-{'tls' if tls else 'plain'}"
    home.mkdir()
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": str(POOLER_TLS_PORT if tls else POOLER_PORT),
        "unix_socket_dir": "",
        "auth_type": "trust",
        "auth_file": str(home / "users"),
        "pool_mode": "session",
        "max_client_conn": "200",
        "default_pool_size": "20",
        "logfile": str(home / "log"),
    }
    if tls:
        certificate, key = issue(make_authority("bench"), "localhost", ("127.0.0.1",))
        (home / "server.pem").write_bytes(certificate)
        (home / "server.key").write_bytes(key)
        settings |= {
            "client_tls_sslmode": "require",
            "client_tls_cert_file": str(home / "server.pem"),
            "client_tls_key_file": str(home / "server.key"),
            "server_tls_sslmode": "require",
        }
    else:
        settings["server_tls_sslmode"] = "disable"
    (home / "users").write_text(f'"{USER}" "{password}"\n')
    lines = "\n".join(f"{name} = {value}" for name, value in settings.items())
    (home / "pgbouncer.ini").write_text(f"[databases]\n* = host={DIRECT_TARGET} port={PORT}\n[pgbouncer]\n{lines}\n")
    for path in (home, *home.iterdir()):
        os.chown(path, account.pw_uid, account.pw_gid)
    become = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    process = subprocess.Popen(
        inside([*become, "/usr/sbin/pgbouncer", "-q", str(home / "pgbouncer.ini")], netns=where),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(0.5)
        if process.poll() is not None:
            raise BenchError(f"pgbouncer did not start: {(home / 'log').read_text()}")
        yield process.pid
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(10)


def _fill(server: PostgresServer, password: str, megabytes: int) -> None:
    server.run_sql(f"CREATE ROLE {USER} LOGIN PASSWORD '{password}'")
    server.run_sql(f"CREATE DATABASE {DATABASE} OWNER {USER}")
    done = subprocess.run(
        [server.binaries / "pgbench", "-i", "-q", "-h", server.directory, "-p", str(PORT), "-U", USER, DATABASE],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"pgbench -i: {done.stderr}")
    server.run_sql(
        f"SET ROLE {USER};"
        "CREATE UNLOGGED TABLE bulk (id bigint, name text, card text, note text);"
        "INSERT INTO bulk SELECT n, 'customer ' || n, '4000-1234-5678-' || lpad((n % 10000)::text, 4, '0'),"
        f" repeat('x', 60) FROM generate_series(1, {megabytes * 1_000_000 // BULK_ROW}) n;"
        "VACUUM ANALYZE bulk",
        database=DATABASE,
    )


@contextmanager
def lab(seconds: int, megabytes: int) -> Iterator[Bench]:
    """Everything that the routes need, started; and ended afterwards."""
    password = secrets.token_hex(16)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hopgate-bench-")))
        directory.chmod(0o711)
        targets = (PLAIN_TARGET, TLS_TARGET, MASKED_TARGET)
        runner, database = stack.enter_context(linked_namespaces(RUNNER, targets))
        plain = stack.enter_context(namespace())
        ip("link", "add", "direct", "netns", plain, "type", "veth", "peer", "name", "direct", "netns", database)
        for end, address in ((plain, PLAIN), (database, DIRECT_TARGET)):
            ip("-n", end, "address", "add", f"{address}/24", "dev", "direct")
            ip("-n", end, "link", "set", "direct", "up")
        server = stack.enter_context(
            postgres(
                address=DIRECT_TARGET,
                namespace=database,
                settings={"listen_addresses": "*", "max_connections": "120", "shared_buffers": "256MB"},
            )
        )
        _fill(server, password, megabytes)
        poolers = [stack.enter_context(_pooler(directory, plain, password, tls=tls)) for tls in (False, True)]
        hooked = stack.enter_context(cgroup("bench"))
        running = stack.enter_context(gateway(directory / "gateway", namespace=runner, cgroup=hooked))
        running.write_policy(
            POLICY.format(
                pgbench=server.binaries / "pgbench",
                python=Path(sys.executable).resolve(),
                plain=f"{PLAIN_TARGET}:{PORT}",
                secured=f"{TLS_TARGET}:{PORT}",
                masked=f"{MASKED_TARGET}:{PORT}",
            )
        )
        running.write_credential("bench", USER, password)
        running.start()
        assert running.process is not None
        gateway_pid = running.process.pid

        def in_plain(command: Sequence[str]) -> list[str]:
            return inside(command, netns=plain)

        def target(workload: Workload) -> tuple[str, int]:
            return (TLS_TARGET if workload.tls else MASKED_TARGET if workload.masked else PLAIN_TARGET), PORT

        routes = (
            Route("direct", in_plain, lambda _: (DIRECT_TARGET, PORT), list, password),
            Route(
                "pgbouncer",
                in_plain,
                lambda workload: ("127.0.0.1", POOLER_TLS_PORT if workload.tls else POOLER_PORT),
                lambda: poolers,
                "",
            ),
            Route("hopgate", running.inside, target, lambda: [gateway_pid, *samples.children(gateway_pid)], ""),
        )
        yield Bench(routes, running, server, seconds)


def run(bench: Bench, workloads: Sequence[Workload], rounds: int) -> list[Figures]:
    """All workloads on all their routes, in turn."""
    figures = {
        (workload.name, route): Figures(workload.name, route, workload.unit)
        for workload in workloads
        for route in workload.routes
    }
    for workload in workloads:
        for turn in range(rounds):
            samples.tell(f"{workload.name}, round {turn + 1} of {rounds}")
            for route in samples.rotated(workload.routes, turn):
                figures[workload.name, route].samples.append(bench.measure(workload, route))
    return list(figures.values())


def table(figures: Sequence[Figures]) -> str:
    """The figures for people; ratios are to direct."""
    lines = [
        f"{'':36}{'direct':>12}{'pgbouncer':>20}{'hopgate':>20}",
        f"{'':48}{'ratio   CPU us':>20}{'ratio   CPU us':>20}",
    ]
    for name in dict.fromkeys(each.workload for each in figures):
        by_route = {each.route: each for each in figures if each.workload == name}
        direct = by_route["direct"]
        line = f"{name:36}{direct.rate:>8,.0f} {direct.unit:4}".ljust(48)
        for route in ROUTES[1:]:
            each = by_route.get(route)
            if each is None:
                line += f"{'-':>20}"
            else:
                cpu = "-" if each.cpu_us is None else f"{each.cpu_us:,.1f}"
                line += f"{each.rate / direct.rate:>11.2f}{cpu:>9}"
        lines.append(line.rstrip())
    lines.append("ratio: rate to direct's; CPU us: of the route's own processes, for each transaction or megabyte")
    return "\n".join(lines)


def document(figures: Sequence[Figures], rounds: int, seconds: int, megabytes: int) -> dict[str, object]:
    """The same for programs, with every sample."""
    direct = {each.workload: each.rate for each in figures if each.route == "direct"}
    return {
        **samples.head(),
        "rounds": rounds,
        "seconds": seconds,
        "megabytes": megabytes,
        "figures": [
            {**asdict(each), "rate": each.rate, "ratio": each.rate / direct[each.workload], "cpu_us": each.cpu_us}
            for each in figures
        ],
    }


def main(arguments: Sequence[str]) -> int:
    options = samples.options("scripts/bench", "direct, PgBouncer and Hopgate side by side", arguments, "bench")
    workloads = [workload for workload in WORKLOADS if options.only in workload.name]
    if not workloads:
        sys.exit(f"no workload has `{options.only}` in its name: {', '.join(each.name for each in WORKLOADS)}")
    rounds, seconds, megabytes = (3, 1, 60) if options.quick else (5, 2, 300)
    samples.tell("three hosts, a PostgreSQL, two PgBouncers, a Hopgate")
    try:
        with lab(seconds, megabytes) as bench:
            figures = run(bench, workloads, rounds)
    except BenchError as error:
        sys.exit(f"bench: {error}")
    options.output.write_text(json.dumps(document(figures, rounds, seconds, megabytes), indent=1) + "\n")
    print(table(figures))
    samples.tell(f"every sample is in {options.output}")
    return 0
