"""What the kernel's part costs everybody on the host: `scripts/bench kernel` runs it. Needs root, and leaves nothing
behind.

    nothing           no tracepoint of ours; a cgroup without hooks, a network namespace without rules
    bare redirect     the same, but for one rule of iptables, without a set: REDIRECT of the protected port. The floor
    hooks             everything loaded and attached; a namespace without rules, a port that no policy names
    rules             hooks, and a namespace with the rules, and so with conntrack; a port that no policy names
    redirect          the same, a protected port: recorded, redirected to a listener that accepts and closes
    + intercept       the last two from an agent with `intercept: all`, whose packets are looked at

Every state has its turn in every round, and the order rotates; a ratio is the median of what each round says, with the
interval in which 95 of 100 such medians would lie. Clients and listeners are `connects.c`. The target is in three
places:

    loopback          an address of the client's own host: the shortest way that there is, for both, and nobody's case
    wire              another network namespace, at the other end of a veth pair, without rules of anybody
    container         the same behind a bridge, and the rules that Docker makes are there in all states, so that
                      conntrack and NAT are no news: a service container on a runner

What is redirected does not leave the client's namespace, where the listener is.

What is measured is `connect()` alone, from the call until the client's end is established: by one process, and by four
at a time. With a redirect that is the way to the gateway; the gateway's own way to the target comes later, at its
login, and is not in it. Beside it fork, exec, exit and wait of a small static program, with hooks and without, in many
short rounds.

Then, not at the same time: nanoseconds that each program takes (the kernel counts them while it is asked to), the maps'
memory, and what the host agent's `Attribution.attribute` takes inside accept, for a lineage of so many images. New
images have to be read from the map; `new process` has one, its own, `new job` has all but two.

Blind spots: the tracepoints are the machine's, and so another Hopgate that runs here is in all states. While ours are
off, processes go unseen; those of the bench are children of one that was seen. What the records of thousands of
connections a second cost beyond the connect (they are taken one by one, by the host agent) is in `attribute`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostagent import kernel
from hostagent.attribution import AgentMatcher, Attribution
from hostagent.kernel import abi, bpf, loader, redirect
from proxy.model import Chain, Endpoint
from proxy.policy.document import Agent
from tests.kernel.bed import BEYOND, HERE, LISTEN_PORT, PORT, Bed, bed, original_destination
from tests.lab import cgroups, namespaces
from tests.lab.bench import samples
from tests.lab.bench.samples import BenchError

SOURCE = Path(__file__).with_name("connects.c")
TARGET = "198.51.100.10"
OTHER_PORT = 6000
"""A port that no policy names."""
MANY = 4
"""Processes that connect at a time."""
STATES = ("nothing", "bare redirect", "hooks", "rules", "redirect", "rules + intercept", "redirect + intercept")
UNHOOKED = ("nothing", "bare redirect")
PLACES = {"loopback": TARGET, "wire": BEYOND[0], "container": BEYOND[0]}
"""Where the target is, and its address there."""
CONNECTS = {f"connect, {place}{many}": place for place in PLACES for many in ("", f", {MANY} at a time")}
STORMS = tuple(workload for workload in CONNECTS if workload.endswith("at a time"))
CONNECT, SPAWN = "connect, loopback", "fork + exec"
WORKLOADS = {**dict.fromkeys(CONNECTS, STATES), SPAWN: ("nothing", "hooks")}
DOCKER = """\
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 192.0.2.0/24 ! -o bridge -j MASQUERADE
-A DOCKER -i bridge -j RETURN
COMMIT
*filter
:DOCKER - [0:0]
-A FORWARD -o bridge -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o bridge -j DOCKER
-A FORWARD -i bridge -j ACCEPT
COMMIT
"""
"""What Docker puts in for its default network, but for its isolation from other networks."""
BARE = f"*nat\n-A OUTPUT -p tcp --dport {PORT} -j REDIRECT --to-ports {LISTEN_PORT}\nCOMMIT\n"
_RULES = {"nothing": "plain", "hooks": "plain", "bare redirect": "bare"}
TRACEPOINTS = {**abi.TRACEPOINTS, **abi.TELLING_TRACEPOINTS}
AGENTS = ("/bin/bash", "/usr/bin/git", "/usr/bin/python3", "/usr/bin/psql")
DEEP = 30
SEEN = {"program runs": "programs", "memory of the maps": "maps", "attribution": "attribution"}


@dataclass(frozen=True)
class Sample:
    """One run: microseconds of one, and how many a second by all."""

    p50_us: float
    p99_us: float
    rate: float


@dataclass
class Figures:
    """`runs` has the samples of each workload in each state, round by round."""

    runs: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    programs: dict[str, dict[str, float]] = field(default_factory=dict)
    maps: dict[str, dict[str, int]] = field(default_factory=dict)
    attribution: dict[str, dict[str, float]] = field(default_factory=dict)

    def ratio(self, workload: str, state: str) -> float:
        """Time of one, to that with nothing; for many at a time, how many fewer there are."""
        return samples.ratio(*self._pairs(workload, state))

    def interval(self, workload: str, state: str) -> tuple[float, float]:
        return samples.interval(*self._pairs(workload, state))

    def _pairs(self, workload: str, state: str) -> tuple[list[float], list[float]]:
        ours, base = self.runs[workload, state], self.runs[workload, STATES[0]]
        if workload in STORMS:
            return [each.rate for each in base], [each.rate for each in ours]
        return [each.p50_us for each in ours], [each.p50_us for each in base]


class Lab:
    """The bed with its clients and listeners. `hosts` are the clients' network namespaces, by the target's place and
    what is in them: `plain`, `bare` (a REDIRECT) or `ruled`. `unhooked` is a cgroup without hooks."""

    def __init__(self, made: Bed, program: Path, hosts: dict[tuple[str, str], str], unhooked: Path) -> None:
        self.bed = made
        self.program = str(program)
        self.unhooked = unhooked
        self._hosts = hosts
        status = program.stat()
        self._agents = frozenset({(status.st_dev, status.st_ino)})

    def run(self, state: str, place: str, *words: str) -> str:
        """What the client prints, in this state's cgroup and namespace. Raises `BenchError`."""
        cgroup = self.unhooked if state in UNHOOKED else self.bed.cgroup
        netns = self._hosts[place, _RULES.get(state, "ruled")]
        done = cgroups.run([self.program, *words], cgroup=cgroup, netns=netns, timeout_s=120)
        if done.returncode:
            raise BenchError(f"`{' '.join(words)}` with `{state}`: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def measure(self, workload: str, state: str, count: int) -> Sample:
        """Raises `BenchError`."""
        counters = self.bed.pins.counters()
        if workload == SPAWN:
            told = json.loads(self.run(state, "loopback", "spawn", str(count)))
        else:
            many = MANY if workload in STORMS else 1
            place, port = CONNECTS[workload], PORT if "redirect" in state else OTHER_PORT
            words = (PLACES[place], str(port), str(count // many), str(many))
            told = json.loads(self.run(state, place, "connect", *words))
            self._check(state, count // many * many, counters)
        return Sample(**told)

    def _check(self, state: str, count: int, before: dict[str, int]) -> None:
        """A state has to be what it claims to be."""
        grown = {name: value - before[name] for name, value in self.bed.pins.counters().items()}
        recorded = count if state.startswith("redirect") else 0
        if grown["connects"] < recorded or (not recorded and grown["connects"]):
            raise BenchError(f"`{state}`: `{grown['connects']}` connects were recorded of `{count}`")
        lost = {
            name: value for name, value in grown.items() if value and name in (*abi.OVERFLOWS, "unlabelled_connects")
        }
        if lost:
            raise BenchError(f"`{state}`: the tables were too small: {lost}")
        self.bed.pins.sweep(0)

    def protect(self, netns: str) -> None:
        """Puts the rules into one more namespace. They go with it."""
        with namespaces.entered(netns):
            redirect.install(redirect.Rules.of(self.bed.settings, self.bed.scope))

    @contextmanager
    def entered(self, state: str) -> Iterator[None]:
        """In this state, and back to `hooks`."""
        if state in UNHOOKED:
            self._detach()
        elif state.endswith("intercept"):
            self._apply(self._agents)
        try:
            yield
        finally:
            if state in UNHOOKED:
                self._attach()
            elif state.endswith("intercept"):
                self._apply(None)

    def _detach(self) -> None:
        for name in TRACEPOINTS:
            (self.bed.settings.pin_dir / f"link_{name}").unlink()

    def _attach(self) -> None:
        for name, tracepoint in TRACEPOINTS.items():
            program = bpf.object_get(self.bed.settings.pin_dir / f"program_{name}")
            link = bpf.raw_tracepoint_open(tracepoint, program)
            loader.pin(link, self.bed.settings.pin_dir / f"link_{name}")
            os.close(program)
            os.close(link)

    def _apply(self, agents: frozenset[tuple[int, int]] | None) -> None:
        with namespaces.entered(self.bed.netns):
            kernel.apply_scope(self.bed.settings, self.bed.pins, kernel.Scope(ports=(PORT,), agents=agents))


def _compile(directory: Path) -> Path:
    program = directory / "connects"
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-static", "-o", program, SOURCE], check=True, timeout=60)
    return program


@contextmanager
def _serving(program: Path, netns: str, *ports: int) -> Iterator[None]:
    """A listener that accepts and closes."""
    listener = cgroups.start([str(program), "serve", *map(str, ports)], netns=netns, stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout is not None
        if listener.stdout.readline() != "ready\n":
            raise BenchError(f"nobody listens at {ports}")
        yield
    finally:
        listener.kill()
        listener.wait()


def _iptables(netns: str, rules: str) -> None:
    command = ["nsenter", f"--net=/run/netns/{netns}", "iptables-restore", "--noflush"]
    subprocess.run(command, input=rules, text=True, check=True, timeout=60)


@contextmanager
def _bridged() -> Iterator[tuple[str, str]]:
    """The namespaces of a host with Docker's rules and of a container on it."""
    with namespaces.linked_namespaces((), BEYOND[0]) as (host, container):
        namespaces.ip("-n", host, "link", "add", "bridge", "type", "bridge")
        namespaces.ip("-n", host, "link", "set", "wire", "master", "bridge")
        namespaces.ip("-n", host, "address", "add", f"{HERE[0]}/24", "dev", "bridge")
        namespaces.ip("-n", host, "link", "set", "bridge", "up")
        _iptables(host, DOCKER)
        yield host, container


@contextmanager
def _hosts(program: Path, made: Bed) -> Iterator[dict[tuple[str, str], str]]:
    """The clients' namespaces, with who listens there and beyond."""
    hosts = {("wire", "ruled"): made.netns}
    with ExitStack() as stack:
        beyond = [made.beyond]
        for kind in ("plain", "bare"):
            hosts["wire", kind], there = stack.enter_context(namespaces.linked_namespaces(HERE, BEYOND))
            beyond.append(there)
        for kind in ("plain", "bare", "ruled"):
            hosts["container", kind], there = stack.enter_context(_bridged())
            beyond.append(there)
            namespaces.ip("-n", hosts["wire", kind], "address", "add", TARGET, "dev", "lo")
            hosts["loopback", kind] = hosts["wire", kind]
        for place in ("wire", "container"):
            _iptables(hosts[place, "bare"], BARE)
        for netns in {*hosts.values(), *beyond}:
            stack.enter_context(_serving(program, netns, OTHER_PORT, LISTEN_PORT))
        yield hosts


class Relay:
    """A process that a daemon started, which connects, or has others connect, when it is told to."""

    def __init__(self, lab: Callable[[list[str]], list[str]], program: Path) -> None:
        self._process = subprocess.Popen(
            lab([str(program), "orphan", TARGET, str(PORT)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise BenchError("the relay did not start")

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()


# --- states -----------------------------------------------------------------------------------------------------------


def run(lab: Lab, figures: Figures, workloads: Sequence[str], *, quick: bool) -> None:
    connects = [name for name in workloads if name in CONNECTS]
    if connects:
        _rounds(lab, figures, connects, rounds=9 if quick else 61, count=600 if quick else 800)
    if SPAWN in workloads:
        _rounds(lab, figures, [SPAWN], rounds=51 if quick else 301, count=100)


def _rounds(lab: Lab, figures: Figures, workloads: Sequence[str], *, rounds: int, count: int) -> None:
    states = WORKLOADS[workloads[0]]
    for turn in range(rounds):
        if turn % 10 == 0:
            samples.tell(f"{workloads[0]} …, round {turn + 1} of {rounds}")
        for state in samples.rotated(states, turn):
            with lab.entered(state):
                for workload in workloads:
                    times = 2 * count if workload in STORMS else count
                    figures.runs.setdefault((workload, state), []).append(lab.measure(workload, state, times))


# --- programs and maps ------------------------------------------------------------------------------------------------


@contextmanager
def _counting() -> Iterator[None]:
    """The kernel counts what programs take, all programs on the machine, until the descriptor is closed: by whatever
    ends us."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    descriptor = libbpf.bpf_enable_stats(0)
    if descriptor < 0:
        raise BenchError(f"the kernel does not count what programs take: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        os.close(descriptor)


def _bpftool(*words: str) -> dict[str, Any]:
    done = subprocess.run(["bpftool", "-j", *words], capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"`bpftool {' '.join(words)}`: {done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def count_programs(lab: Lab, *, quick: bool) -> dict[str, dict[str, float]]:
    """Nanoseconds of each program a run, and its runs for each connection that the bench makes: of the tracepoints
    those of the whole machine."""
    pins = lab.bed.settings.pin_dir
    names = [*abi.PROGRAMS, *abi.PACKET_HOOKS]

    def totals() -> dict[str, tuple[int, int]]:
        shown = {name: _bpftool("prog", "show", "pinned", str(pins / f"program_{name}")) for name in names}
        return {name: (each.get("run_time_ns", 0), each.get("run_cnt", 0)) for name, each in shown.items()}

    state = "redirect + intercept"
    connects, spawns = (4000, 500) if quick else (20_000, 2000)
    with lab.entered(state), _counting():
        before = totals()
        lab.measure(CONNECT, state, connects)
        # not protected, so that its packets are looked at
        lab.measure(CONNECT, "rules + intercept", connects)
        lab.measure(SPAWN, state, spawns)
        after = totals()
    grown = {name: (after[name][0] - before[name][0], after[name][1] - before[name][1]) for name in names}
    return {
        name: {"ns": ns / runs, "runs": runs, "runs_a_connect": runs / (2 * connects)}
        for name, (ns, runs) in grown.items()
        if runs
    }


def weigh_maps(lab: Lab) -> dict[str, dict[str, int]]:
    """Bytes and entries of each map, as the kernel accounts for it."""
    found = {}
    for path in sorted(lab.bed.settings.pin_dir.iterdir()):
        if not path.name.startswith(("link_", "program_")):
            shown = _bpftool("map", "show", "pinned", str(path))
            found[path.name] = {"bytes": shown["bytes_memlock"], "entries": shown["max_entries"]}
    return found


# --- attribution ------------------------------------------------------------------------------------------------------


def attribute(lab: Lab, relay: Relay, *, quick: bool) -> dict[str, dict[str, float]]:
    """What the host agent does inside accept. Raises `BenchError`."""
    agents = [Agent(name=Path(exe).name, exe=exe) for exe in AGENTS if Path(exe).exists()]
    attribution = Attribution(lab.bed.pins, AgentMatcher([*agents, Agent(name="connects", exe=lab.program)]))
    count = 300 if quick else 1000
    with namespaces.entered(lab.bed.netns):
        listener = socket.create_server(("::", LISTEN_PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    listener.settimeout(10)

    def once(line: str) -> tuple[float, int]:
        relay.tell(line)
        connection, address = listener.accept()
        with connection:
            peer = Endpoint(address[0].removeprefix("::ffff:"), address[1])
            dialled = original_destination(connection, False)
            start = time.perf_counter_ns()
            chain = attribution.attribute(peer, dialled)
            took = time.perf_counter_ns() - start
        if not isinstance(chain, Chain):
            raise BenchError(f"a connection was not attributed: {chain.reason}")
        return took / 1e3, len(chain.lineage)

    def many(line: str, count: int) -> dict[str, float]:
        once(line)
        took, depths = zip(*(once(line) for _ in range(count)), strict=True)
        if len(set(depths)) != 1:
            raise BenchError(f"lineages of `{set(depths)}` images in the place of one")
        cuts = statistics.quantiles(took, n=100)
        return {"images": depths[0], "p50_us": statistics.median(took), "p99_us": cuts[98], "connections": count}

    with closing(listener):
        shallow = many("1", count)
        above = int(shallow["images"]) - 1
        found = {"new process, shallow": shallow, "new job, deep": many(str(DEEP - above), count // 2)}
        relay.tell(f"+{DEEP - 1 - above}")
        found["new process, deep"] = many("1", count)
    return found


# --- the whole --------------------------------------------------------------------------------------------------------


def bench(wanted: Callable[[str], bool], *, quick: bool) -> Figures:
    """Raises `BenchError`."""
    figures = Figures()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hopgate-bench-")))
        directory.chmod(0o711)
        program = _compile(directory)
        unhooked = stack.enter_context(cgroups.cgroup("unhooked"))
        made = stack.enter_context(bed("bench", kernel.MapSizes(), load=False))
        made.listener.close()
        made.scope = kernel.Scope(ports=(PORT,))
        # before the programs are loaded, so that it is found as the child of init that it is
        relay = Relay(lambda command: cgroups.inside(command, cgroup=made.cgroup, netns=made.netns), program)
        stack.callback(relay.close)
        made.load()
        with _hosts(program, made) as hosts:
            lab = Lab(made, program, hosts, unhooked)
            lab.protect(hosts["container", "ruled"])
            workloads = [name for name in WORKLOADS if wanted(name)]
            if workloads:
                run(lab, figures, workloads, quick=quick)
            if wanted("program runs"):
                samples.tell("programs")
                figures.programs = count_programs(lab, quick=quick)
        if wanted("memory of the maps"):
            figures.maps = weigh_maps(lab)
        if wanted("attribution"):
            samples.tell("attribution")
            figures.attribution = attribute(lab, relay, quick=quick)
    return figures


def table(figures: Figures) -> str:
    """The figures for people."""
    lines = []
    for workload, states in WORKLOADS.items():
        if (workload, STATES[0]) not in figures.runs:
            continue
        lines.append(f"\n{workload:34}{'':>14}{'ratio':>7}   95 % of such")
        for state in states:
            runs = figures.runs[workload, state]
            if workload in STORMS:
                cell = f"{statistics.median(each.rate for each in runs):,.0f}/s"
            else:
                cell = f"{statistics.median(each.p50_us for each in runs):,.1f} us"
            low, high = figures.interval(workload, state)
            lines.append(f"  {state:32}{cell:>14}{figures.ratio(workload, state):>7.3f}   {low:.3f} to {high:.3f}")
    if figures.programs:
        lines.append("\nprogram                  ns a run    runs a connect")
        for name, each in figures.programs.items():
            traced = name in TRACEPOINTS and name not in abi.TELLING_TRACEPOINTS
            lines.append(f"{name:22}{each['ns']:>11,.0f}" + ("" if traced else f"{each['runs_a_connect']:>18.1f}"))
    if figures.maps:
        total = sum(each["bytes"] for each in figures.maps.values())
        largest = sorted(figures.maps.items(), key=lambda item: -item[1]["bytes"])[:4]
        told = ", ".join(f"{name} {each['bytes'] / 2**20:.1f}" for name, each in largest)
        lines.append(f"\nmaps: {total / 2**20:.1f} MiB ({told})")
    if figures.attribution:
        lines.append(f"\n{'attribution':26}{'images':>8}{'p50 us':>10}{'p99 us':>10}")
        for name, taken in figures.attribution.items():
            lines.append(f"{name:26}{taken['images']:>8.0f}{taken['p50_us']:>10.0f}{taken['p99_us']:>10.0f}")
    return "\n".join(lines)


def document(figures: Figures) -> dict[str, object]:
    """The same for programs, with every sample."""
    return {
        **samples.head(),
        "figures": [
            {
                "workload": workload,
                "state": state,
                "ratio": figures.ratio(workload, state),
                "interval": figures.interval(workload, state),
                "samples": [vars(each) for each in runs],
            }
            for (workload, state), runs in figures.runs.items()
        ],
        "programs": figures.programs,
        "maps": figures.maps,
        "attribution": figures.attribution,
    }


def main(arguments: Sequence[str]) -> int:
    options = samples.options(
        "scripts/bench kernel", "connecting and starting processes with hooks and without", arguments, "bench-kernel"
    )
    names = [*WORKLOADS, *SEEN]
    if not any(options.only in name for name in names):
        sys.exit(f"no workload has `{options.only}` in its name: {', '.join(names)}")
    # so that the lab is taken down when we are told to end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        figures = bench(lambda name: options.only in name, quick=options.quick)
    except BenchError as error:
        sys.exit(f"bench: {error}")
    options.output.write_text(json.dumps(document(figures), indent=1) + "\n")
    print(table(figures))
    samples.tell(f"every sample is in {options.output}")
    return 0
