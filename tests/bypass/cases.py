"""The classes of attack: who tries what, and what has to come of it.

An expectation is the word for what the witnesses saw (`bed.Seen.outcome`). `because` says why something that gets
through is out of scope, and what closes it; of anything else, what is worth knowing. Attackers:

    user      an unprivileged user, agent `attack`: may do nothing
    nobody's  the same user with a program that is no agent
    root      user 0 without the capabilities that docs/threat-model.md forbids (`bed.LESS`); with CAP_NET_RAW
    …+CAP     root with that capability back
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bypass.bed import (
    ATTACKER,
    DATABASE,
    DBA,
    FREE_PORT,
    HIDDEN_PORTS,
    LESS,
    PORT,
    PROTECTED_PORT,
    RUNNER,
    SINK_PORT,
    SOURCE,
    UNLISTED,
    UPLINK,
    Bed,
    Seen,
    uplink,
)
from tests.lab.namespaces import ip, namespace, sysctl

PROXY = Path(__file__).with_name("connect_proxy.py")
DENIED = "denied and recorded (attack)"
DENIED_NOBODYS = "denied and recorded (unattributed)"
DENIED_UNKNOWN = "denied and recorded (nobody known)"
CLOSED = "closed"
REACHED = "reached"


@dataclass(frozen=True)
class Case:
    name: str
    attacker: str
    expected: str
    run: Callable[[Bed], Seen]
    because: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}-{self.attacker}".replace(" ", "_")

    @property
    def promise(self) -> str:
        """What the table says is expected."""
        through = self.expected.startswith((REACHED, "answered"))
        if through and self.attacker != "control":
            what = "alerted" if self.expected.endswith(", alerted") else "out of scope"
            return f"{what}, because {self.because}: {self.expected}"
        return self.expected


CASES: list[Case] = []


def case(
    name: str, attacker: str, expected: str, because: str = ""
) -> Callable[[Callable[[Bed], Seen]], Callable[[Bed], Seen]]:
    def add(run: Callable[[Bed], Seen]) -> Callable[[Bed], Seen]:
        CASES.append(Case(name, attacker, expected, run, because))
        return run

    return add


_WHO: dict[str, dict[str, Any]] = {
    "user": {},
    "nobody's": {"program": "tool"},
    "root": {"uid": 0, "without": LESS},
    "root -NET_RAW": {"uid": 0, "without": f"{LESS},net_raw"},
}


def attack(bed: Bed, who: str, way: str, *arguments: object, **options: Any) -> Seen:
    """One attacker, from a new token to what came of it."""
    bed.begin()
    return bed.end(bed.run(command(bed, who, way, *arguments, **options)))


def until(met: Callable[[], bool], what: str, timeout_s: float = 10) -> None:
    """Raises `TimeoutError`."""
    deadline = time.monotonic() + timeout_s
    while not met():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.02)


def command(bed: Bed, who: str, way: str, *arguments: object, **options: Any) -> list[str]:
    given = {**_WHO[who], **options}
    if isinstance(given.get("program"), str):
        given["program"] = getattr(bed, given["program"])
    return bed.command(way, *arguments, **given)


def way(
    name: str, attacker: str, expected: str, way: str, *arguments: object, because: str = "", **options: Any
) -> None:
    """A class that is one call of the program."""
    case(name, attacker, expected, because)(lambda bed: attack(bed, attacker, way, *arguments, **options))


# --- controls: the witnesses see what there is to see -----------------------------------------------------------------


@case("control: an agent that may", "control", "answered as dba")
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "plain", program="dba", uid=DBA)


@case("control: a host without hopgate", "control", REACHED)
def _(bed: Bed) -> Seen:
    with uplink(bed.database) as netns:
        bed.begin()
        return bed.end(bed.run(bed.command("plain", address=UPLINK[1]), netns=netns, outside=True))


# --- older than the hooks ---------------------------------------------------------------------------------------------


@case("connection older than hopgate", "user", REACHED, "what exists at the start is left alone: start hopgate first")
def _(bed: Bed) -> Seen:
    bed.begin()
    return bed.end(bed.early("connected"))


@case("socket made before attach", "user", DENIED)
def _(bed: Bed) -> Seen:
    bed.begin()
    return bed.end(bed.early("made"))


# --- the redirect -----------------------------------------------------------------------------------------------------

for who, what in (("user", DENIED), ("nobody's", DENIED_NOBODYS), ("root", DENIED)):
    way("IPv4", who, what, "plain")
for family, address in (("IPv6", DATABASE[1]), ("IPv4 mapped into IPv6", f"::ffff:{DATABASE[0]}")):
    way(family, "user", DENIED, "plain", address=address)
way("TCP fast open: sendto", "user", DENIED, "fast_open_sendto")
way("TCP fast open: connect option", "user", DENIED, "fast_open_connect")
way("io_uring connect: inline", "user", DENIED, "uring")
way("io_uring connect: worker thread", "user", DENIED, "uring_async")
way("io_uring connect: SQPOLL", "user", DENIED, "uring_sqpoll")
way("MPTCP", "user", DENIED, "mptcp")
way("MPTCP, fast open: sendto", "user", DENIED, "fast_open_mptcp")
way("socket that was connected elsewhere before", "user", DENIED, "again", SINK_PORT)
way("source address of another host, IPv4", "user", CLOSED, "foreign", UPLINK[0])
way("source address of another host, IPv6", "user", CLOSED, "foreign", "2001:db8::77", address=DATABASE[1])
way("source address of another host, IP_TRANSPARENT", "root", CLOSED, "foreign", UPLINK[0], "transparent")
way("IPv6 extension headers", "root", DENIED, "extended", address=DATABASE[1])
way("SMC", "user", CLOSED, "smc", because="this kernel has none; elsewhere its TCP socket is the caller's")
way("UDP, IPv4", "user", CLOSED, "udp")
way("UDP, IPv6", "user", CLOSED, "udp", address=DATABASE[1])
way("loose source route", "user", CLOSED, "source_route", RUNNER[0])
way("segment routing header", "user", CLOSED, "source_route", RUNNER[1], address=DATABASE[1])
way("SO_BINDTODEVICE: the uplink", "user", CLOSED, "device", "wire")
way("SO_BINDTODEVICE: loopback", "user", CLOSED, "device", "lo", RUNNER[0])
way("SO_MARK forged", "user", CLOSED, "mark", "0x0f0e")
way(
    "SO_MARK forged", "root", DENIED, "mark", "0x0f0e", because="CAP_NET_RAW is enough to set it; sock_ops takes it off"
)


@case("SO_MARK forged in the workers' cgroup", "root", DENIED)
def _(bed: Bed) -> Seen:
    bed.begin()
    return bed.end(bed.run(command(bed, "root", "mark", "0x0f0e"), group="workers"))


@case("SO_MARK forged in the workers' cgroup: UDP", "root", CLOSED)
def _(bed: Bed) -> Seen:
    bed.begin()
    return bed.end(bed.run(command(bed, "root", "udp", "0x0f0e"), group="workers"))


@case("SO_MARK forged in the workers' cgroup: raw IP", "root", f"{DENIED_UNKNOWN}, alerted")
def _(bed: Bed) -> Seen:
    bed.begin()
    with bed.silenced(42_019):
        said = bed.run(command(bed, "root", "raw", RUNNER[0], 42_019, "2", "0x0f0e"), group="workers")
    return bed.end(said)


@case("connect straight to the listener", "user", CLOSED)
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "plain", address="127.0.0.1", port=bed.listen_port)


@case("connect straight to the listener, by the host's address", "user", CLOSED)
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "plain", address=RUNNER[0], port=bed.listen_port)


@case("another name or address of the target", "user", DENIED, "no target there: protected ports hold for any address")
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "plain", address=UNLISTED)


way("target on another port, protected", "user", DENIED, "plain", port=PROTECTED_PORT)
way(
    "target on another port, not protected",
    "user",
    REACHED,
    "plain",
    port=FREE_PORT,
    because="of an agent without `intercept: all` they are not looked at: say so, or name ports under `protect`",
)


for family, address, source_port in (("IPv4", DATABASE[0], 42_001), ("IPv6", DATABASE[1], 42_003)):
    way(
        f"a connection that outlives its conntrack entry, {family}",
        "user",
        DENIED,
        "outlive",
        source_port,
        3,
        address=address,
        because="the filter table refuses what nat did not redirect",
    )


@case("IPv6 link-local", "user", CLOSED, "redirected, and the loopback does not answer there")
def _(bed: Bed) -> Seen:
    found = ip("-n", bed.database, "-6", "-brief", "address", "show", "dev", "wire", "scope", "link").split()
    return attack(bed, "user", "plain", address=f"{found[2].partition('/')[0]}%wire")


@case("source port of an agent that may, reused", "user", DENIED)
def _(bed: Bed) -> Seen:
    attack(bed, "user", "source_port", 42_002, program="dba", uid=DBA)
    return attack(bed, "user", "source_port", 42_002)


# --- databases that are no target: `spy` is intercepted ---------------------------------------------------------------

INTERCEPTED = "denied and recorded (spy), alerted"
_ports = iter(HIDDEN_PORTS)


def hidden(name: str, way_: str, *arguments: object, because: str = "", **options: Any) -> None:
    name = f"hidden database, {name}"
    way(name, "user", INTERCEPTED, way_, *arguments, because=because, program="spy", port=next(_ports), **options)


hidden("IPv4", "plain")
hidden("IPv6", "plain", address=DATABASE[1])
hidden("IPv4 mapped into IPv6", "plain", address=f"::ffff:{DATABASE[0]}")
hidden("TCP fast open: sendto", "fast_open_sendto")
hidden("TCP fast open: connect option", "fast_open_connect")
hidden("io_uring connect: SQPOLL", "uring_sqpoll")
hidden("MPTCP", "mptcp")
hidden("a byte in each segment", "trickle")
hidden("socket made by the parent", "fork_between")
hidden("re-parented", "orphan")


@case(
    "hidden database, net namespace with an uplink of its own",
    "user",
    INTERCEPTED,
    "the programs are the cgroup's: rules are not needed",
)
def _(bed: Bed) -> Seen:
    with uplink(bed.database) as netns:
        bed.begin()
        attacker = command(bed, "user", "plain", program="spy", address=UPLINK[1], port=HIDDEN_PORTS[-1])
        return bed.end(bed.run(attacker, netns=netns))


# --- below the socket -------------------------------------------------------------------------------------------------


def told(bed: Bed, *arguments: object) -> Seen:
    """Root below TCP, and the alert that says who it was."""
    bed.begin()
    said = bed.run(command(bed, "root", *map(str, arguments)))
    until(lambda: bool(bed.alerts()), "the alert")
    return bed.end(said)


@case("raw IP: a handshake by hand", "root", f"{DENIED_UNKNOWN}, alerted")
def _(bed: Bed) -> Seen:
    with bed.silenced(42_010):
        return told(bed, "raw", RUNNER[0], 42_010)


@case("raw IP: SYN with FIN", "root", f"{CLOSED}, alerted")
def _(bed: Bed) -> Seen:
    with bed.silenced(42_011):
        return told(bed, "raw", RUNNER[0], 42_011, 3)


@case("raw IP: a stray segment, then connect", "root", f"{CLOSED}, alerted")
def _(bed: Bed) -> Seen:
    return told(bed, "raw_stray", RUNNER[0], 42_012)


@case("raw IP: tiny fragments, unassembled", "root", f"{CLOSED}, alerted")
def _(bed: Bed) -> Seen:
    return told(bed, "raw_fragments", RUNNER[0], 42_013, 8)


@case("raw IP: fragments, unassembled", "root", f"{CLOSED}, alerted")
def _(bed: Bed) -> Seen:
    return told(bed, "raw_fragments", RUNNER[0], 42_014, 16)


way("raw IP", "root -NET_RAW", CLOSED, "raw", RUNNER[0], 42_015)
way("raw IP", "user", CLOSED, "raw", RUNNER[0], 42_015)

BELOW_IP = "CAP_NET_RAW writes below IP, where no rule is: agents must not have it"


@case("AF_PACKET SYN", "root", f"{REACHED}, alerted", BELOW_IP)
def _(bed: Bed) -> Seen:
    return told(bed, "packet", RUNNER[0], 42_016, "wire")


@case(
    "AF_PACKET SYN, past the device's queue",
    "root",
    f"{REACHED}, alerted",
    f"{BELOW_IP}; seen while the socket is open",
)
def _(bed: Bed) -> Seen:
    return told(bed, "packet", RUNNER[0], 42_018, "wire", 6)


way("AF_PACKET SYN", "root -NET_RAW", CLOSED, "packet", RUNNER[0], 42_017, "wire")
way("AF_PACKET SYN", "user", CLOSED, "packet", RUNNER[0], 42_017, "wire")


# --- sockets that change hands ----------------------------------------------------------------------------------------


def handed(bed: Bed, state: str) -> Seen:
    path = bed.work / f"hand-{state}"
    bed.begin()
    giver = command(bed, "user", "give", path, state, program="dba", uid=DBA)
    os.chmod(bed.work, 0o777)
    with bed.started(giver):
        said = bed.run(command(bed, "user", "take", path, state))
    return bed.end(said)


@case("SCM_RIGHTS: a socket not yet connected", "user", DENIED, "who connects is asked, not who made the socket")
def _(bed: Bed) -> Seen:
    return handed(bed, "made")


@case("SCM_RIGHTS: a socket whose SYN waits for data", "user", DENIED, "who writes first sends it, and is asked")
def _(bed: Bed) -> Seen:
    return handed(bed, "deferred")


@case(
    "SCM_RIGHTS: a connected socket", "user", "answered as dba", "an agent that hands out its connection lends its name"
)
def _(bed: Bed) -> Seen:
    return handed(bed, "connected")


def robbed(bed: Bed, **robber: Any) -> Seen:
    bed.begin()
    with bed.started(command(bed, "user", "keep", program="dba", uid=DBA)) as (_, line):
        said = bed.run(command(bed, "user", "rob", *line.split(), **robber))
    return bed.end(said)


@case(
    "pidfd_getfd", "user", "not denied: nothing was asked (dba)", "the victim's own idle session; the theft is refused"
)
def _(bed: Bed) -> Seen:
    return robbed(bed)


@case(
    "pidfd_getfd", "root", "not denied: nothing was asked (dba)", "the victim's own idle session; the theft is refused"
)
def _(bed: Bed) -> Seen:
    return robbed(bed, **_WHO["root"])


@case("pidfd_getfd", "root +SYS_PTRACE", "answered as dba", "CAP_SYS_PTRACE is every process on the host")
def _(bed: Bed) -> Seen:
    return robbed(bed, uid=0, without=LESS.replace(",sys_ptrace", ""))


@case("pidfd_getfd", "the agent's own user", "answered as dba", "a user's processes are one unless ptrace_scope is 1")
def _(bed: Bed) -> Seen:
    return robbed(bed, uid=DBA)


# --- lineage ----------------------------------------------------------------------------------------------------------

way("fork between socket() and connect()", "user", DENIED, "fork_between")
way("CLONE_PARENT", "user", DENIED, "clone_parent")
way("double fork, setsid, orphaned", "user", DENIED, "orphan")
way("chain too long for the tables", "user", DENIED_UNKNOWN, "deep", 1100, "/proc/self/exe")


@case("moved to another cgroup", "user", DENIED_UNKNOWN, "there is no record outside of the hooked cgroup")
def _(bed: Bed) -> Seen:
    bed.begin()
    return bed.end(bed.run(command(bed, "user", "plain"), outside=True))


def below(bed: Bed, program: Path | str, *names: object, who: str = "user", **options: Any) -> Seen:
    """The attacker's agent starts a program as the user that agent `dba` has to be."""
    return attack(bed, who, "run_as", program, *names, uid=DBA, **options)


@case("an agent below that may more", "user", "denied and recorded (attack > dba)")
def _(bed: Bed) -> Seen:
    return below(bed, bed.dba)


@case("LD_PRELOAD into an agent, from below another", "user", "denied and recorded (attack > dba)")
def _(bed: Bed) -> Seen:
    return below(bed, bed.dba, above=["env", f"LD_PRELOAD={preload(bed)}"])


@case("LD_PRELOAD into an agent, by another user", "nobody's", DENIED_NOBODYS)
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "plain", program="dba", above=["env", f"LD_PRELOAD={preload(bed)}"])


@case(
    "LD_PRELOAD into an agent",
    "the agent's own user",
    "answered as dba",
    "who may start the program as that user is that agent",
)
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "plain", program="dba", uid=DBA, above=["env", f"LD_PRELOAD={preload(bed)}"])


def preload(bed: Bed) -> Path:
    """The program as a library that runs before what loads it does."""
    path = bed.directory / "bin" / "preload.so"
    if not path.exists():
        subprocess.run(["gcc", "-shared", "-fPIC", "-DPRELOADED", "-O1", "-o", path, SOURCE], check=True)
    return path


# --- borrowed identities: by the agent's own user, below no agent: the best that an attacker can have ---------------


@case("copy of an agent's executable", "the agent's own user", DENIED_NOBODYS)
def _(bed: Bed) -> Seen:
    copy = bed.work / "dba"
    shutil.copy(bed.dba, copy)
    return attack(bed, "user", "plain", program=copy, uid=DBA)


@case("hard link to an agent's executable", "user", "denied and recorded (attack > dba)", "it is the same file")
def _(bed: Bed) -> Seen:
    link = bed.directory / "bin" / "link"
    if not link.exists():
        os.link(bed.dba, link)
    return below(bed, link)


@case("bind mount over an agent's executable", "the agent's own user", DENIED_NOBODYS)
def _(bed: Bed) -> Seen:
    script = f'mount --bind {bed.tool} {bed.dba} && exec "$0" "$@"'
    above = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    return attack(bed, "user", "plain", program="dba", uid=DBA, above=above)


@case("memfd of an agent's executable", "the agent's own user", DENIED_NOBODYS)
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "from_memory", bed.dba, program="tool", uid=DBA)


@case("agent's user id claimed in a user namespace", "nobody's", DENIED_NOBODYS)
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "plain", program="dba", above=["unshare", "--user", f"--map-user={DBA}"])


@case("agent's executable run by the dynamic loader", "the agent's own user", DENIED_NOBODYS)
def _(bed: Bed) -> Seen:
    loader = next(path for path in Path("/lib64").glob("ld-linux*") if path.exists())
    return attack(bed, "user", "plain", program="dba", uid=DBA, above=[str(loader)])


@case("prctl name", "the agent's own user", DENIED_NOBODYS)
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "named", "dba", program="tool", uid=DBA)


@case("argv forged", "the agent's own user", DENIED_NOBODYS)
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "run_as", bed.tool, bed.dba, program="tool", uid=DBA)


@case("environment forged", "the agent's own user", DENIED_NOBODYS)
def _(bed: Bed) -> Seen:
    above = ["env", "HOPGATE_AGENT=dba", f"_={bed.dba}", "PGUSER=shop_app"]
    return attack(bed, "user", "plain", program="tool", uid=DBA, above=above)


@case(
    "agent declared from below another", "user", f"{DENIED}, alerted", "also where the policy lets this user declare it"
)
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "declare", bed.gateway.directory / "run" / "declare.sock", "guest")


@case(
    "agent declared by way of a daemon",
    "user",
    "answered as guest",
    "`declared_by: uid:N` gives the agent to whatever runs as that user below no agent",
)
def _(bed: Bed) -> Seen:
    return submitted(bed, bed.tool, ATTACKER, "declare", bed.gateway.directory / "run" / "declare.sock", "guest")


def traced(bed: Bed, **tracer: Any) -> Seen:
    bed.begin()
    with bed.started(command(bed, "user", "sleeper", program="dba", uid=DBA)) as (_, pid):
        return bed.end(bed.run(command(bed, "user", "traced", pid, **tracer)))


if os.uname().machine == "x86_64":
    for who in ("user", "root"):
        case("ptrace of an agent that may", who, CLOSED)(lambda bed, who=who: traced(bed, **_WHO[who]))
    case(
        "ptrace of an agent that may",
        "root +SYS_PTRACE",
        "answered as dba",
        "CAP_SYS_PTRACE is every process on the host",
    )(lambda bed: traced(bed, uid=0, without=LESS.replace(",sys_ptrace", "")))
    case(
        "ptrace of an agent that may",
        "the agent's own user",
        "answered as dba",
        "a user's processes are one unless ptrace_scope is 1",
    )(lambda bed: traced(bed, uid=DBA))


# --- somebody else connects -------------------------------------------------------------------------------------------


def forwarded(bed: Bed, port: int, *chain: str, uid: int) -> Seen:
    forward = ["/usr/bin/socat", f"TCP-LISTEN:{port},fork,reuseaddr", f"TCP:{DATABASE[0]}:{PORT}"]
    bed.begin()
    launcher = command(bed, "user", "launch", *forward, program=chain[0], uid=uid)
    with bed.started(launcher, ready=False) as (forwarder, _):
        sockets = Path(f"/proc/{forwarder.pid}/net/tcp")
        until(lambda: f":{port:04X} 00000000:0000 0A" in sockets.read_text(), "the forwarder")
        return bed.end(bed.run(command(bed, "user", "plain", address="127.0.0.1", port=port)))


@case("local forwarder of no agent", "user", DENIED_NOBODYS)
def _(bed: Bed) -> Seen:
    return forwarded(bed, 7001, "tool", uid=DBA)


@case(
    "local forwarder of an agent that may",
    "user",
    "answered as dba",
    "an agent that serves others lends its name: do not let agents listen",
)
def _(bed: Bed) -> Seen:
    return forwarded(bed, 7002, "dba", uid=DBA)


@contextmanager
def http_proxy(bed: Bed, netns: str, port: int) -> Iterator[None]:
    with bed.started(["/usr/bin/python3", str(PROXY), str(port)], netns=netns) as (_, line):
        assert line == "ready", line
        yield


@case("HTTP CONNECT proxy on this host", "user", DENIED_NOBODYS)
def _(bed: Bed) -> Seen:
    with http_proxy(bed, bed.runner, 3128):
        return attack(bed, "user", "http_connect", "127.0.0.1", 3128)


@case(
    "HTTP CONNECT proxy elsewhere",
    "user",
    REACHED,
    "another host is another host: let the database take this one's address only from it",
)
def _(bed: Bed) -> Seen:
    with http_proxy(bed, bed.database, 3128):
        return attack(bed, "user", "http_connect", DATABASE[0], 3128)


def submitted(bed: Bed, program: Path, uid: int, way: str = "plain", *arguments: object) -> Seen:
    """A daemon that is not below the attacker runs what the attacker tells it."""
    spool = bed.work / f"spool-{uid}"
    spool.unlink(missing_ok=True)
    bed.begin()
    daemon = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "socat"]
    os.chmod(bed.work, 0o777)
    with bed.started([*daemon, f"UNIX-LISTEN:{spool},mode=777,fork", "EXEC:/bin/sh"], ready=False):
        until(lambda: spool.exists(), "the daemon's socket")
        words = [program, way, DATABASE[0], PORT, bed.token, *arguments]
        job = f"echo {' '.join(map(str, words))} | socat -t3 - UNIX-CONNECT:{spool}"
        return bed.end(bed.run(command(bed, "user", "launch", "/bin/sh", "-c", job)))


@case("at, cron, systemd-run: a daemon starts it", "user", DENIED_NOBODYS)
def _(bed: Bed) -> Seen:
    return submitted(bed, bed.tool, ATTACKER)


@case(
    "at, cron, systemd-run: it starts an agent's program", "user", DENIED_NOBODYS, "the agent is told by its user too"
)
def _(bed: Bed) -> Seen:
    return submitted(bed, bed.dba, ATTACKER)


@case(
    "a daemon that starts things as the agent's user",
    "user",
    "answered as dba",
    "a daemon that runs jobs of others as that user lends its name",
)
def _(bed: Bed) -> Seen:
    return submitted(bed, bed.dba, DBA)


# --- namespaces -------------------------------------------------------------------------------------------------------

ROUTED = ("203.0.113.2", "203.0.113.1")

way("new user and net namespace, no uplink", "user", CLOSED, "new_namespace")


@case(
    "net namespace behind the host's",
    "user",
    DENIED,
    "as containers have it: PREROUTING redirects, the same record tells",
)
def _(bed: Bed) -> Seen:
    with namespace() as netns:
        ip("link", "add", "eth0", "netns", netns, "type", "veth", "peer", "name", "box", "netns", bed.runner)
        for end, device, address in ((netns, "eth0", ROUTED[0]), (bed.runner, "box", ROUTED[1])):
            ip("-n", end, "address", "add", f"{address}/24", "dev", device)
            ip("-n", end, "link", "set", device, "up")
        ip("-n", netns, "route", "add", "default", "via", ROUTED[1])
        sysctl(bed.runner, "net.ipv4.ip_forward", "1")
        bed.begin()
        return bed.end(bed.run(command(bed, "user", "plain"), netns=netns))


@case("setns into another net namespace", "root", CLOSED)
def _(bed: Bed) -> Seen:
    return attack(bed, "root", "plain", above=["nsenter", f"--net=/run/netns/{bed.database}"])


@case("setns into another net namespace", "root +SYS_ADMIN", REACHED, "CAP_SYS_ADMIN is root of the host")
def _(bed: Bed) -> Seen:
    return attack(bed, "root", "plain", without="", above=["nsenter", f"--net=/run/netns/{bed.database}"])


# --- not TCP over IP --------------------------------------------------------------------------------------------------


@case("AF_UNIX socket of a database on this host", "user", REACHED, "file permissions guard it")
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "local", bed.server.directory / f".s.PGSQL.{PORT}")


@case(
    "argv that an agent is told by",
    "nobody's",
    "answered as clerk",
    "whoever starts a program chooses its arguments: agents need a uid or cgroup too",
)
def _(bed: Bed) -> Seen:
    return attack(bed, "user", "plain", "clerks-work", program="clerk")


way("vsock", "user", CLOSED, "vsock", 2, because="nothing listens here; it is not IP, and hopgate does not see it")


# After half a minute of other classes, and before the daemon is killed: it tells only of what it has lived through.
@case(
    "net namespace with an uplink of its own",
    "user",
    f"{REACHED}, alerted",
    "the host's rules are not there, and only root makes such a namespace; it is told half a minute later",
)
def _(bed: Bed) -> Seen:
    past = f"a connection to {UPLINK[1]}:{PORT} in another network namespace went past the proxy"
    until(lambda: past in bed.gateway.log(), "the alert", 40)
    bed.escaped.alerts = [line for line in bed.gateway.log().splitlines() if past in line]
    return bed.escaped


# --- the gateway itself -----------------------------------------------------------------------------------------------


@case("SO_REUSEPORT theft of the listener's port", "user", CLOSED)
def _(bed: Bed) -> Seen:
    bed.begin()
    return bed.end(bed.run(command(bed, "user", "squat", address="::", port=bed.listen_port)))


@case("daemon killed", "user", CLOSED)
def _(bed: Bed) -> Seen:
    with daemon_gone(bed):
        return attack(bed, "user", "plain")


@case(
    "SO_MARK forged in the workers' cgroup, after connect()",
    "root",
    CLOSED,
    "the rules ask for the socket, not its mark",
)
def _(bed: Bed) -> Seen:
    with daemon_gone(bed):
        bed.begin()
        return bed.end(bed.run(command(bed, "root", "mark_later", "0x0f0e", 5500), group="workers"))


@case("theft of the listener's port while the daemon is gone", "user", CLOSED, "a port below 1024 is not for users")
def _(bed: Bed) -> Seen:
    with daemon_gone(bed):
        bed.begin()
        with bed.started(command(bed, "user", "squat", address="::", port=bed.listen_port)) as (thief, said):
            lines = [said]
            if said == "ready":
                bed.run(command(bed, "user", "plain", program="dba", uid=DBA))
                lines += thief.communicate(timeout=10)[0].splitlines()
            return bed.end(lines)


@contextmanager
def daemon_gone(bed: Bed) -> Iterator[None]:
    workers = bed.workers()
    bed.gateway.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the end of the workers")
    try:
        yield
    finally:
        bed.gateway.start()


@case("SIGSTOP of the workers", "root", CLOSED, "root can stop anything; what is stopped lets nothing through")
def _(bed: Bed) -> Seen:
    workers = bed.workers()
    stop = f"kill -STOP {' '.join(map(str, workers))}"
    bed.begin()
    try:
        bed.run([*less(LESS), "sh", "-c", stop])
        return bed.end(bed.run(command(bed, "user", "plain", program="dba", uid=DBA)))
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        time.sleep(1)


@case(
    "recording disk filled", "user", CLOSED, "an agent that may is refused too: what cannot be recorded does not happen"
)
def _(bed: Bed) -> Seen:
    filler = bed.gateway.state_dir / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        return attack(bed, "user", "plain", program="dba", uid=DBA)
    finally:
        filler.unlink()


@case("deleting rules, sets and pins", "root", f"{DENIED}, alerted", "pins are files: they are put back, and were held")
def _(bed: Bed) -> Seen:
    flush = "iptables -t nat -F; ip6tables -t nat -F; iptables -F; ipset flush; nft flush ruleset"
    script = f"{flush}; rm -f {bed.gateway.pin_dir}/*"
    bed.begin()
    bed.run([*less(LESS), "sh", "-c", script])
    said = bed.run(command(bed, "user", "plain"))
    time.sleep(1.5)
    return bed.end(said)


@case(
    "writing into the pinned maps",
    "root",
    f"{REACHED}, alerted",
    "pins are root's files, and to open them takes no CAP_BPF: agents that are root must not see the host's files",
)
def _(bed: Bed) -> Seen:
    bed.begin()
    said = bed.run(command(bed, "root", "pinned", bed.gateway.pin_dir), group="workers")
    until(lambda: bool(bed.alerts()), "the alert")
    return bed.end(said)


@case("writing into the pinned maps", "user", DENIED)
def _(bed: Bed) -> Seen:
    said = attack(bed, "user", "pinned", bed.gateway.pin_dir).said
    seen = attack(bed, "user", "plain")
    seen.said = said + seen.said
    return seen


@case(
    "deleting rules",
    "root +NET_ADMIN",
    f"{REACHED}, alerted",
    "CAP_NET_ADMIN is the network: the rules come back within a moment",
)
def _(bed: Bed) -> Seen:
    bed.begin()
    once = " ".join(bed.command("plain", uid=0))
    script = f"for n in $(seq 99); do iptables -F; iptables -t nat -F; {once} | grep answered && break; done"
    said = bed.run(["sh", "-c", script])
    time.sleep(1.5)
    return bed.end(said)


def less(capabilities: str) -> list[str]:
    """The command that root gives these capabilities up with."""
    return ["setpriv", f"--bounding-set={','.join(f'-{name}' for name in capabilities.split(','))}"]


@case(
    "flooding the ring buffer", "user", INTERCEPTED, "what finds no room is dropped all the same; the loss is alerted"
)
def _(bed: Bed) -> Seen:
    bed.begin()
    said = bed.run(command(bed, "user", "many", 12_000, program="spy", port=SINK_PORT))
    until(lambda: any("had more to tell than there was room for" in line for line in bed.alerts()), "the alert", 15)
    seen = bed.end(said)
    latest: set[str] = set()
    # what is still in the ring is of this attack
    while (rows := {row.id for row in bed.end([]).sessions}) != latest:
        latest = rows
        time.sleep(0.5)
    return seen


@case(
    "filling the table of records",
    "user",
    DENIED,
    "what users do in namespaces of their own has a table of its own: an agent that may is served meanwhile",
)
def _(bed: Bed) -> Seen:
    said = bed.run(command(bed, "user", "flood", 66_000), timeout_s=60)
    served = attack(bed, "user", "plain", program="dba", uid=DBA)
    seen = attack(bed, "user", "plain") if served.outcome == "answered as dba" else served
    seen.said = said + served.said + seen.said
    return seen


NOT_RUN = {
    "filling the tables of processes and images": "takes 65,536 processes or 98,304 live images: "
    "`tests/kernel` does it with small tables; who finds no room is denied",
    "a socket without room for what the kernel keeps of an intercepted agent": "`tests/kernel` does it with a small "
    "net.core.optmem_max; such a connection is closed for data",
    "SCTP, DCCP": "this kernel has neither, and PostgreSQL speaks neither",
    "vsock to a database": "needs a hypervisor with a database; AF_VSOCK is not IP and not looked at",
    "ptrace_scope": "this kernel has no Yama; where it is 1, the rows of the agent's own user are closed for ptrace",
}
"""Classes that cannot be shown on this machine, and why."""
