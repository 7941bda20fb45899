"""A real API server, asked directly and through Hopgate, side by side: `scripts/bench kubernetes` runs it. Needs root,
and leaves nothing behind.

    namespace plain (no rules)                                     namespace cluster
        https ------------------------------ wire ------------------\\
    namespace runner (hooked cgroup, rules)                          > etcd, kube-apiserver
        https --redirect--> hopgate -------- wire ------------------/

The client (`https.go`) is one program for both routes, with HTTP/1.1 and TLS on both; directly it shows the token that
otherwise the gateway has. Hopgate attributes, judges and records, as it does in production. The server has two
addresses on the runner's wire, so that one policy has a target with a mask and one without.

    small GET       so many of one ConfigMap, one after the other, on one kept connection
    large list      Pods, 5 MB of JSON, as they are and with the values of their environment masked
    watches held    each on a connection of its own; workers' memory (PSS) before and after, in a gateway that is fresh,
                    with the client's TLS and without: the difference is what TLS towards one peer takes

CPU is user and system time of workers and host agent. That routes are what they claim is checked: Hopgate's sessions
grow with its own clients, and with no others.

Blind spots: client, gateway and server share the cores, so a rate tells of the whole machine; the server's own time is
in both routes, and a faster server would make the ratio worse; nothing leaves the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.bench import samples
from tests.lab.bench.samples import BenchError
from tests.lab.cgroups import cgroup, inside
from tests.lab.hopgate import Gateway, gateway
from tests.lab.kubernetes import GoMissing, KubernetesServer, kubernetes
from tests.lab.namespaces import ip, linked_namespaces, namespace

SOURCE = Path(__file__).with_name("https.go")
RUNNER, TARGET, MASKED_TARGET = "192.0.2.1", "192.0.2.20", "192.0.2.21"
PLAIN, DIRECT_TARGET = "198.51.100.1", "198.51.100.10"
PORT = 6443
ROUTES = ("direct", "hopgate")
TIMEOUT_S = 120
SETTLED_S = 2.0
"""After the last watch stands."""

PODS, VARIABLES = 1000, 20
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": "web-NAME",
        "labels": {"app": "web", "pod-template-hash": "7d4b9c8f6d", "team": "shop"},
        "annotations": {"example.com/note": "n" * 400, "example.com/config": "c" * 400},
    },
    "spec": {
        "containers": [
            {
                "name": name,
                "image": f"registry.example/shop/{name}:1.2.3",
                "env": [
                    {"name": f"VARIABLE_{n}", "value": f"value {n} of NAME {'v' * 60}"} for n in range(VARIABLES // 2)
                ],
            }
            for name in ("web", "sidecar")
        ]
    },
}
LIST = "/api/v1/namespaces/bulk/pods"
SMALL = "/api/v1/namespaces/default/configmaps/small"
WATCH = "/api/v1/namespaces/default/configmaps?watch=true"

POLICY = f"""\
agents:
  job: {{exe: /usr/bin/nsenter}}
targets:
  plain:
    protocol: kubernetes
    addresses: "{TARGET}:{PORT}"
    tls: {{ca: cluster-ca.pem}}
    credential: cluster
  masked:
    protocol: kubernetes
    addresses: "{MASKED_TARGET}:{PORT}"
    tls: {{ca: cluster-ca.pem}}
    credential: cluster
rules:
  - {{name: bench-reads, agents: job, targets: "*", verbs: read, resources: "*", namespaces: "*", decision: allow}}
  - name: environments-are-masked
    agents: "*"
    targets: masked
    masks:
      - {{resource: pods, field: "spec.containers[*].env[*].value", method: redact}}
      - {{resource: secrets, field: "data.*", method: redact}}
"""


@dataclass(frozen=True)
class Workload:
    """`count` requests for `path`; `quick` when it is only for a look. `of` is the workload whose direct figures it is
    held against."""

    name: str
    path: str
    count: int
    quick: int
    masked: bool = False
    routes: tuple[str, ...] = ROUTES
    of: str = ""


WORKLOADS = (
    Workload("small GET, kept connection", SMALL, 1000, 1000),
    Workload("large list", LIST, 8, 3),
    Workload("large list, one field masked", LIST, 8, 3, masked=True, routes=("hopgate",), of="large list"),
)
WATCHES = {"watches held": True, "watches held, no TLS with the client": False}


@dataclass
class Sample:
    """One run: requests and megabytes a second, CPU microseconds of the gateway for each request."""

    rate: float
    megabytes: float
    p50_us: float
    p99_us: float
    cpu_us: float


@dataclass
class Held:
    """So many watches, KiB of the workers and of the host agent for each, and seconds until all stood."""

    watches: int
    workers_kib: float
    host_agent_kib: float
    seconds: float


@dataclass
class Bed:
    """Where everything runs. `ca` is of the gateway once it is started."""

    directory: Path
    server: KubernetesServer
    runner: str
    plain: str
    cgroup: Path
    program: Path
    figures: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    held: dict[str, list[Held]] = field(default_factory=dict)

    @contextmanager
    def gateway(self, *, offer_tls: bool = True) -> Iterator[Gateway]:
        """A gateway that was just started."""
        home = Path(tempfile.mkdtemp(prefix="gateway-", dir=self.directory))
        home.chmod(0o711)
        with gateway(home, namespace=self.runner, cgroup=self.cgroup, settings={"offer_tls": offer_tls}) as made:
            shutil.copy(self.server.ca_path, made.policy_dir / "cluster-ca.pem")
            made.write_policy(POLICY)
            made.write_entry("cluster", {"token": self.server.token})
            made.start()
            yield made

    def direct(self, *words: str, stdin: bytes = b"") -> str:
        command = [str(self.program), *self._to(DIRECT_TARGET, self.server.ca_path), *words]
        return _run(inside(command, netns=self.plain), {"TOKEN": self.server.token}, stdin)

    def through(self, made: Gateway, words: Sequence[str], address: str, *, tls: bool = True) -> list[str]:
        """A job's command."""
        ca = made.directory / "ca.pem"
        if not ca.exists():
            shutil.copy(made.ca_path, ca)
            ca.chmod(0o644)
        return made.inside([str(self.program), *self._to(address, ca if tls else None), *words])

    def _to(self, address: str, ca: Path | None) -> list[str]:
        return ["-address", f"{address}:{PORT}", "-name", address, *(["-ca", str(ca)] if ca is not None else [])]


def _run(command: Sequence[str], environment: Mapping[str, str], stdin: bytes = b"") -> str:
    done = subprocess.run(
        command, input=stdin, capture_output=True, timeout=TIMEOUT_S, env={"PATH": os.environ["PATH"], **environment}
    )
    if done.returncode:
        raise BenchError(f"`{' '.join(command)}`: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode()


def _build(directory: Path) -> Path:
    """Raises `BenchError`."""
    go = shutil.which("go") or "/usr/local/go/bin/go"
    program = directory / "https"
    done = subprocess.run(
        [go, "build", "-o", str(program), str(SOURCE)],
        capture_output=True,
        text=True,
        env={**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"},
    )
    if done.returncode:
        raise BenchError(f"`{SOURCE.name}` does not build: {done.stderr}")
    return program


@contextmanager
def bed() -> Iterator[Bed]:
    """Everything but the gateway, filled."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hopgate-bench-")))
        directory.chmod(0o711)
        program = _build(directory)
        runner, cluster = stack.enter_context(linked_namespaces(RUNNER, (TARGET, MASKED_TARGET)))
        plain = stack.enter_context(namespace())
        ip("link", "add", "direct", "netns", plain, "type", "veth", "peer", "name", "direct", "netns", cluster)
        for end, address in ((plain, PLAIN), (cluster, DIRECT_TARGET)):
            ip("-n", end, "address", "add", f"{address}/24", "dev", "direct")
            ip("-n", end, "link", "set", "direct", "up")
        server = stack.enter_context(
            kubernetes(
                address=DIRECT_TARGET,
                namespace=cluster,
                names=(TARGET, MASKED_TARGET),
                settings={"bind-address": "0.0.0.0"},
            )
        )
        hooked = stack.enter_context(cgroup("bench"))
        made = Bed(directory, server, runner, plain, hooked, program)
        server.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bulk"}})
        server.create(
            "/api/v1/namespaces/default/configmaps",
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "small"}, "data": {"key": "value" * 20}},
        )
        made.direct("create", LIST, str(PODS), stdin=json.dumps(POD).encode())
        yield made


def measure(bed: Bed, made: Gateway, workload: Workload, route: str, count: int) -> Sample:
    """Runs a workload on a route once. Raises `BenchError`."""
    assert made.process is not None
    ours = [made.process.pid, *samples.children(made.process.pid)]
    recorded, cpu = _sessions(made), samples.cpu_s(ours)
    words = ["get", workload.path, str(count)]
    if route == "direct":
        said = bed.direct(*words)
    else:
        said = _run(bed.through(made, words, MASKED_TARGET if workload.masked else TARGET), {})
    told = json.loads(said)
    spent = samples.cpu_s(ours) - cpu
    if (_sessions(made) - recorded) != (route == "hopgate"):
        raise BenchError(f"`{workload.name}` on `{route}`: hopgate recorded `{_sessions(made) - recorded}` sessions")
    seconds = told["seconds"]
    return Sample(
        count / seconds, told["bytes"] / 1e6 / seconds, told["p50_us"], told["p99_us"], spent * 1e6 / (count + 1)
    )


def hold(bed: Bed, watches: int, *, tls: bool) -> Held:
    """What so many watches take of a fresh gateway. Raises `BenchError`."""
    with bed.gateway(offer_tls=tls) as made:
        assert made.process is not None
        # what is made once, by the first session
        _run(bed.through(made, ["get", SMALL, "20"], TARGET, tls=tls), {})
        workers = samples.children(made.process.pid)
        before, before_host = samples.memory_kib(workers), samples.memory_kib([made.process.pid])
        client = subprocess.Popen(
            bed.through(made, ["watch", WATCH, str(watches)], TARGET, tls=tls),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"]},
        )
        try:
            assert client.stdout is not None
            assert client.stderr is not None
            line = client.stdout.readline()
            if not line:
                raise BenchError(
                    f"`{watches}` watches did not stand: {client.stderr.read().strip()}\n{made.log()[-2000:]}"
                )
            time.sleep(SETTLED_S)
            held = Held(
                watches,
                (samples.memory_kib(workers) - before) / watches,
                (samples.memory_kib([made.process.pid]) - before_host) / watches,
                json.loads(line)["seconds"],
            )
        finally:
            client.kill()
            client.communicate()
        if samples.children(made.process.pid) != workers:
            raise BenchError(f"a worker ended meanwhile:\n{made.log()[-2000:]}")
        return held


def _sessions(made: Gateway) -> int:
    return sum(1 for _ in (made.state_dir / "recordings").rglob("*.hgr"))


def run(bed: Bed, wanted: Callable[[str], bool], *, quick: bool) -> None:
    """All workloads on all their routes, in turn."""
    workloads = [workload for workload in WORKLOADS if wanted(workload.name)]
    # what a masked one is held against
    workloads += [each for each in WORKLOADS if each not in workloads and any(each.name == one.of for one in workloads)]
    turns = [(workload, route) for workload in workloads for route in workload.routes]
    rounds = 5 if quick else 15
    if turns:
        with bed.gateway() as made:
            for turn in range(rounds):
                samples.tell(f"requests, round {turn + 1} of {rounds}")
                for workload, route in samples.rotated(turns, turn):
                    count = workload.quick if quick else workload.count
                    sample = measure(bed, made, workload, route, count)
                    bed.figures.setdefault((workload.name, route), []).append(sample)
    for turn in range(1 if quick else 3):
        for name in filter(wanted, WATCHES):
            samples.tell(f"{name}, round {turn + 1}")
            bed.held.setdefault(name, []).append(hold(bed, 1000, tls=WATCHES[name]))


def ratio(bed: Bed, workload: Workload) -> float:
    """Requests a second, to direct's."""
    direct = bed.figures[workload.of or workload.name, "direct"]
    return samples.ratio([each.rate for each in bed.figures[workload.name, "hopgate"]], [each.rate for each in direct])


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def table(bed: Bed) -> str:
    lines = [f"{'':40}{'direct':>20}{'hopgate':>20}{'ratio':>10}{'CPU us':>10}"]
    for workload in WORKLOADS:
        ours = bed.figures.get((workload.name, "hopgate"))
        if ours is None:
            continue
        direct = bed.figures[workload.of or workload.name, "direct"]
        cells = [
            f"{_median([each.p50_us for each in side]):,.0f} us, {_median([each.megabytes for each in side]):,.0f} MB/s"
            if workload.path == LIST
            else f"{_median([each.p50_us for each in side]):,.0f} us"
            for side in (direct, ours)
        ]
        cpu = _median([each.cpu_us for each in ours])
        lines.append(f"{workload.name:40}{cells[0]:>20}{cells[1]:>20}{ratio(bed, workload):>10.2f}{cpu:>10,.0f}")
    for name, held in bed.held.items():
        workers, host = (_median([getattr(each, key) for each in held]) for key in ("workers_kib", "host_agent_kib"))
        lines.append(
            f"{name:40}{workers:.1f} KiB of the workers for each of {held[0].watches}, {host:.1f} KiB of the host agent"
        )
    lines.append(
        "us: median of one request; ratio: requests a second to direct's; CPU us: workers and host agent, each request"
    )
    return "\n".join(lines)


def document(bed: Bed) -> dict[str, object]:
    """The same for programs, with every sample."""
    return {
        **samples.head(),
        "kubernetes": bed.server.programs.version,
        "figures": [
            {
                "workload": name,
                "route": route,
                "ratio": next((ratio(bed, each) for each in WORKLOADS if each.name == name), 0.0)
                if route == "hopgate"
                else 1.0,
                "samples": [vars(each) for each in taken],
            }
            for (name, route), taken in bed.figures.items()
        ],
        "held": {name: [vars(each) for each in held] for name, held in bed.held.items()},
    }


def main(arguments: Sequence[str]) -> int:
    options = samples.options(
        "scripts/bench kubernetes",
        "an API server directly and through Hopgate, side by side",
        arguments,
        "bench-kubernetes",
    )
    names = [*(workload.name for workload in WORKLOADS), *WATCHES]
    if not any(options.only in name for name in names):
        sys.exit(f"no workload has `{options.only}` in its name: {', '.join(names)}")
    samples.tell("three hosts, an etcd, an API server, a Hopgate")
    try:
        with bed() as made:
            run(made, lambda name: options.only in name, quick=options.quick)
            options.output.write_text(json.dumps(document(made), indent=1) + "\n")
            print(table(made))
    except (BenchError, GoMissing) as error:
        sys.exit(f"bench: {error}")
    samples.tell(f"every sample is in {options.output}")
    return 0
