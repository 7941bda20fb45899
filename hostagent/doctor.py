"""Examines a host: what Hopgate needs, what it has put there, what is weak; each finding with its fix.

    ok       nothing to do
    weak     works, and an agent could make use of it, or an operator will be surprised
    wrong    something is not protected, or nobody is served: the doctor's exit status is 1
    skipped  could not be told, and why

It reads, tries on things of its own, and changes nothing. It works while the daemon does not run; what only the daemon
knows is skipped then.

Whether targets can be reached is tried by a worker, since nobody else may connect to them, up to where a login would
begin.

Blind spot: a credential's password may be wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import enum
import grp
import os
import pwd
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from hostagent import alerts, kernel, powers
from hostagent.attribution import AgentMatcher
from hostagent.control import client, messages
from hostagent.control.store import Store
from hostagent.credentials import CredentialFiles, CredentialUnavailable
from hostagent.errors import OperatorError
from hostagent.kernel import probe
from hostagent.settings import Settings
from proxy.policy.document import Document, PolicyError
from proxy.policy.load import load

SPACE_LEAST = 512 * 1024 * 1024
INODES_LEAST = 10_000
CA_LEAST = datetime.timedelta(days=60)
STEP_US = 60 * 1_000_000
SYSTEM_TRUST = Path("/etc/ssl/certs/ca-certificates.crt")
_POWERFUL_GROUPS = ("sudo", "wheel", "admin", "docker", "lxd", "disk", "shadow")
_TIME_ERROR = 5
_TOLD_MAX = 4


class State(enum.StrEnum):
    OK = "ok"
    WEAK = "weak"
    WRONG = "wrong"
    SKIPPED = "skipped"


class Finding(msgspec.Struct, frozen=True):
    """`fix` is empty where there is nothing to do."""

    check: str
    state: State
    what: str
    fix: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Everything, in the order in which it should be put right. Raises `OperatorError` unless it is run by root."""
    if os.geteuid() != 0:
        raise OperatorError("the doctor has to be run by root")
    report = _status(settings)
    document = _document(settings)
    parts: list[Callable[[], Iterator[Finding]]] = [
        _kernel_features,
        lambda: _mounts(settings),
        lambda: _daemon(settings, report),
        lambda: _attachment(settings),
        lambda: _policy(settings, document, report),
        lambda: _reachable(settings, report),
        lambda: _credentials(settings, document),
        lambda: _authority(settings),
        lambda: _space(settings),
        lambda: _clock(settings),
        lambda: _alerts(settings),
        _hardening,
        lambda: _agents(document),
        lambda: _capabilities(document),
    ]
    findings: list[Finding] = []
    for part in parts:
        findings += part()
    return findings


def _status(settings: Settings) -> dict[str, object] | OperatorError:
    try:
        return client.ask(settings.control_socket, messages.AskStatus(), messages.Status, timeout_s=5).report
    except OperatorError as error:
        return error


def _document(settings: Settings) -> Document | PolicyError:
    try:
        return load(settings.policy_dir)
    except PolicyError as error:
        return error


# --- the kernel -------------------------------------------------------------------------------------------------------


def _kernel_features() -> Iterator[Finding]:
    for name, attempt, fix in probe.features():
        try:
            attempt()
        except (OperatorError, OSError) as error:
            yield Finding(name, State.WRONG, str(error), fix)
        else:
            yield Finding(name, State.OK, "there and usable")


def _mounts(settings: Settings) -> Iterator[Finding]:
    try:
        mount = kernel.cgroup_mount()
    except OperatorError as error:
        yield Finding("cgroup2", State.WRONG, str(error), "mount -t cgroup2 none /sys/fs/cgroup")
        return
    hooked = settings.cgroup or mount
    if not hooked.is_dir() or not hooked.is_relative_to(mount):
        yield Finding(
            "cgroup2", State.WRONG, f"`{hooked}` is no directory below `{mount}`", "put `cgroup` right in the settings"
        )
    elif legacy := probe.legacy_cgroups():
        what = f"mounted on `{mount}`, beside {len(legacy)} hierarchies of the first version (hybrid)"
        yield Finding("cgroup2", State.OK, what)
    else:
        yield Finding("cgroup2", State.OK, f"mounted on `{mount}`, and alone")
    if settings.cgroup is not None:
        yield Finding(
            "cgroup", State.WEAK, f"only processes below `{hooked}` are seen; all others are denied", "`cgroup: auto`"
        )


def _attachment(settings: Settings) -> Iterator[Finding]:
    start = "systemctl restart hopgate"
    if not settings.pin_dir.exists():
        yield Finding("programs and pins", State.WRONG, f"there are none in `{settings.pin_dir}`", start)
    else:
        try:
            whole = kernel.attached(_kernel_settings(settings))
            with kernel.Pins.open(settings.pin_dir) as pins:
                counters, overflowed = pins.counters(), pins.overflowed()
        except (OperatorError, OSError) as error:
            yield Finding("programs and pins", State.WRONG, str(error), start)
        else:
            if whole:
                yield Finding("programs and pins", State.OK, "all of this version, attached to the right cgroup")
            else:
                what = "not complete, of another version, or on another cgroup"
                yield Finding("programs and pins", State.WRONG, what, start)
            told = ", ".join(f"{name} {count}" for name, count in counters.items() if count) or "all 0"
            if overflowed:
                yield Finding("lineage", State.WRONG, f"labels were lost, and those are denied: {told}", start)
            else:
                yield Finding("lineage", State.OK, told)
    try:
        faults = probe.rule_faults()
        yield _backends()
    except OperatorError as error:
        yield Finding("rules", State.WRONG, str(error), "apt-get install iptables ipset")
        return
    if faults:
        yield Finding("rules", State.WRONG, "; ".join(faults[:4]), start)
    else:
        yield Finding("rules", State.OK, "all jumps are there, once and first; chains and sets are there")


def _backends() -> Finding:
    used, foreign = probe.backends()
    check = "iptables"
    if used[4] != used[6]:
        what = f"its rules are in {used[4]} for IPv4 and in {used[6]} for IPv6: who looks at one does not see the other"
        return Finding(check, State.WEAK, what, "update-alternatives --config iptables, and ip6tables; restart hopgate")
    if foreign:
        what = f"ours are in {used[4]}, {len(foreign)} of others are not ({foreign[0]}): both apply, and what was made "
        what += "last comes first: it may take away what should come to us"
        fix = "have all programs of this host use one backend: update-alternatives --config iptables"
        return Finding(check, State.WEAK, what, fix)
    return Finding(check, State.OK, f"{used[4]}; nobody has rules in the other backend")


def _kernel_settings(settings: Settings) -> kernel.Settings:
    cgroup = settings.cgroup or kernel.cgroup_mount()
    return kernel.Settings(
        cgroup=cgroup,
        pin_dir=settings.pin_dir,
        listen_port=settings.listen_port,
        worker_cgroup=settings.worker_cgroup or cgroup,
        sizes=kernel.MapSizes.of(settings.maps),
        run_dir=settings.run_dir,
    )


# --- the daemon -------------------------------------------------------------------------------------------------------


def _daemon(settings: Settings, report: dict[str, object] | OperatorError) -> Iterator[Finding]:
    if isinstance(report, OperatorError):
        yield Finding("daemon", State.WRONG, str(report), "systemctl start hopgate; journalctl -u hopgate")
        return
    wanted = settings.workers or len(os.sched_getaffinity(0))
    if report.get("workers") != wanted:
        what = f"{report.get('workers')} of {wanted} workers serve"
        yield Finding("workers", State.WRONG, what, "journalctl -u hopgate says why they end")
    elif report.get("worker_deaths"):
        what = f"{wanted} serve; {report['worker_deaths']} died since the start"
        yield Finding("workers", State.WEAK, what, "journalctl -u hopgate says why they ended")
    else:
        yield Finding("workers", State.OK, f"{wanted} serve")
    changed = str(report.get("settings_on_disk", ""))
    if changed.startswith("changed"):
        yield Finding("settings", State.WRONG, f"those on disk are {changed}", "systemctl restart hopgate")
    else:
        yield Finding("settings", State.OK, "those on disk are in force")


# --- policy and secrets -----------------------------------------------------------------------------------------------


def _policy(
    settings: Settings, document: Document | PolicyError, report: dict[str, object] | OperatorError
) -> Iterator[Finding]:
    if isinstance(document, PolicyError):
        what = f"{len(document.problems)} problems, the first: {document.problems[0]}"
        yield Finding("policy", State.WRONG, what, f"hopgate policy check {settings.policy_dir}")
        return
    yield Finding("policy", State.OK, f"{len(document.rules)} rules, {len(document.targets)} targets: no problem")
    if isinstance(report, OperatorError):
        yield Finding("policy in force", State.SKIPPED, "the daemon does not run")
    elif report.get("policy_problem"):
        yield Finding("policy in force", State.WRONG, str(report["policy_problem"]), "hopgate reload")
    elif str(report.get("policy_on_disk", "")).startswith("changed"):
        yield Finding("policy in force", State.WRONG, "the one on disk was changed and not loaded", "hopgate reload")
    else:
        yield Finding("policy in force", State.OK, f"{report.get('policy')}, as it is on disk")
    for target in document.targets:
        check = f"target {target.name}"
        for host in target.hosts:
            try:
                found = [host.host] if host.network else _addresses(host.host)
            except OSError as error:
                what = f"`{host.host}` does not resolve: {error.strerror or error}"
                yield Finding(
                    check, State.WRONG, what, "put the name right in the policy, or the resolver on this host"
                )
            else:
                yield Finding(check, State.OK, f"`{host.host}` is {', '.join(found)}, port {host.port}")


def _reachable(settings: Settings, report: dict[str, object] | OperatorError) -> Iterator[Finding]:
    if isinstance(report, OperatorError):
        yield Finding("targets reachable", State.SKIPPED, "only a worker may try, and the daemon does not run")
        return
    try:
        visits = client.ask(settings.control_socket, messages.VisitTargets(), messages.TargetsVisited).visits
    except OperatorError as error:
        yield Finding("targets reachable", State.SKIPPED, str(error))
        return
    if not visits:
        yield Finding("targets reachable", State.SKIPPED, "the policy in force has no target")
    for visit in visits:
        check, at = f"{visit.target or 'more targets'} reachable", f"{visit.endpoint}: " if visit.endpoint else ""
        match visit.reached:
            case True:
                yield Finding(check, State.OK, f"{at}{visit.what}")
            case False:
                yield Finding(check, State.WRONG, visit.what, _UNREACHED)
            case None:
                yield Finding(check, State.SKIPPED, f"{at}{visit.what}")


_UNREACHED = (
    "see to it that the server runs, that no firewall is between, and that `addresses` and `tls` of the target fit"
)


def _addresses(name: str) -> list[str]:
    return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})


def _credentials(settings: Settings, document: Document | PolicyError) -> Iterator[Finding]:
    if isinstance(document, PolicyError):
        yield Finding("credentials", State.SKIPPED, "the policy, which names them, cannot be loaded")
        return
    files = CredentialFiles(settings.credentials_dir)
    named = {name for target in document.targets for name in (target.credential, target.serving) if name}
    for name in sorted(named):
        try:
            files.read(name)
        except CredentialUnavailable as error:
            fix = f"write it into `{files.directory}`, for root only (docs/install.md), and restart"
            yield Finding(f"credential {name}", State.WRONG, str(error), fix)
        else:
            yield Finding(f"credential {name}", State.OK, "readable by root only")


def _authority(settings: Settings) -> Iterator[Finding]:
    path = settings.state_dir / "ca" / "ca.pem"
    fix = "put it back, or move its directory away, restart, and give clients the new ca.pem"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        mode = (path.parent / "ca.key").stat().st_mode & 0o777
    except (OSError, ValueError) as error:
        yield Finding("certificate authority", State.WRONG, f"`{path}` or its key cannot be read: {error}", fix)
        return
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    if mode & 0o077:
        what = f"`{path.parent}/ca.key` has mode `{mode:04o}`, others may use it"
        yield Finding(
            "certificate authority", State.WRONG, what, f"chmod 600 {path.parent}/ca.key, or have a new one made"
        )
    elif left < CA_LEAST:
        yield Finding("certificate authority", State.WRONG, f"it is valid for {max(left.days, 0)} more days", fix)
    else:
        yield Finding("certificate authority", State.OK, f"valid until {certificate.not_valid_after_utc:%Y-%m-%d}")
    trusted = ssl.create_default_context().get_ca_certs(binary_form=True)
    with contextlib.suppress(OSError, ValueError):
        trusted += [
            one.public_bytes(Encoding.DER) for one in x509.load_pem_x509_certificates(SYSTEM_TRUST.read_bytes())
        ]
    if certificate.public_bytes(Encoding.DER) in trusted:
        yield Finding("system trust store", State.OK, "has the host's authority")
    else:
        what = "has not the host's authority: clients that check certificates by it refuse the gateway's"
        copied = f"cp {path} /usr/local/share/ca-certificates/hopgate.crt; update-ca-certificates"
        yield Finding("system trust store", State.WEAK, what, copied)


# --- disk and time ----------------------------------------------------------------------------------------------------


def _space(settings: Settings) -> Iterator[Finding]:
    fix = "make room: without it nothing can be recorded, and nothing runs unrecorded"
    for name, directory in (("state", settings.state_dir), ("recordings", settings.recordings_dir)):
        if name == "recordings" and settings.state_dir.exists() and not directory.exists():
            yield Finding(f"disk of the {name}", State.SKIPPED, "nothing was recorded yet")
            continue
        try:
            found = os.statvfs(directory)
        except OSError as error:
            yield Finding(f"disk of the {name}", State.WRONG, f"`{directory}`: {error.strerror}", "start hopgate once")
            continue
        free = found.f_bavail * found.f_frsize
        what = f"`{directory}`: {free >> 20} MiB free"
        # some file systems make inodes as they need them, and tell 0
        if free < SPACE_LEAST or (found.f_files and found.f_favail < INODES_LEAST):
            yield Finding(f"disk of the {name}", State.WRONG, f"{what}, {found.f_favail} inodes", fix)
        else:
            yield Finding(f"disk of the {name}", State.OK, what)


def _clock(settings: Settings) -> Iterator[Finding]:
    now_us = time.time_ns() // 1000
    fix = "set the clock: recordings and certificates go by it"
    with contextlib.suppress(OperatorError):
        store = Store.open_existing(settings.store_path)
        try:
            latest = store.sessions(limit=1)
        finally:
            store.close()
        if latest and latest[0].opened_us > now_us + STEP_US:
            yield Finding("clock", State.WRONG, "it is behind the latest session: it was set back", fix)
            return
    buffer = ctypes.create_string_buffer(512)
    if ctypes.CDLL(None, use_errno=True).adjtimex(buffer) == _TIME_ERROR:
        yield Finding("clock", State.WEAK, "nothing keeps it synchronised", "apt-get install systemd-timesyncd")
    else:
        yield Finding("clock", State.OK, "synchronised")


def _alerts(settings: Settings) -> Iterator[Finding]:
    files = sorted((settings.state_dir / "alerts").glob(f"*{alerts.SUFFIX}"))
    found: list[alerts.Alert] = []
    for path in files:
        try:
            found += alerts.read(path)
        except (OSError, ValueError) as error:
            yield Finding("alerts", State.WRONG, str(error), "find out who wrote into it; the log has the alerts too")
            return
    since_us = time.time_ns() // 1000 - 86_400_000_000
    recent = [alert for alert in found if alert.at_us > since_us]
    if recent:
        what = f"{len(recent)} in the last day, the latest: {recent[-1].what}"
        yield Finding("alerts", State.WEAK, what, f"read `{files[-1]}`")
    elif files:
        yield Finding("alerts", State.OK, "none in the last day")
    else:
        yield Finding("alerts", State.OK, "none")


# --- what agents could do ---------------------------------------------------------------------------------------------


_SYSCTLS = (
    (
        "kernel/yama/ptrace_scope",
        range(1, 4),
        "a process may trace others of its user, also an agent that may do more",
        "sysctl kernel.yama.ptrace_scope=1",
    ),
    (
        "kernel/unprivileged_bpf_disabled",
        range(1, 3),
        "everybody may load BPF programs",
        "sysctl kernel.unprivileged_bpf_disabled=1",
    ),
    (
        "user/max_user_namespaces",
        range(1),
        "everybody may make user namespaces, and be root in network namespaces of his own",
        "sysctl user.max_user_namespaces=0, unless jobs use rootless containers",
    ),
)


def _hardening() -> Iterator[Finding]:
    for name, strong, what, fix in _SYSCTLS:
        check = name.rpartition("/")[2]
        try:
            value = int(Path("/proc/sys", name).read_text())
        except (OSError, ValueError):
            yield Finding(check, State.SKIPPED, "this kernel does not have it")
            continue
        if value in strong:
            yield Finding(check, State.OK, f"`{value}`")
        else:
            yield Finding(check, State.WEAK, f"`{value}`: {what}", fix)


def _agents(document: Document | PolicyError) -> Iterator[Finding]:
    if isinstance(document, PolicyError):
        yield Finding("users of agents", State.SKIPPED, "the policy, which names them, cannot be loaded")
        return
    for uid in sorted({agent.uid for agent in document.agents if agent.uid is not None}):
        check = f"user {uid}"
        try:
            user = pwd.getpwuid(uid)
        except KeyError:
            yield Finding(
                check, State.WRONG, "the policy tells an agent by this uid, and nobody has it", "put it right"
            )
            continue
        groups = {grp.getgrgid(gid).gr_name for gid in os.getgrouplist(user.pw_name, user.pw_gid) if _known_group(gid)}
        powers = [f"it is in group {group}" for group in _POWERFUL_GROUPS if group in groups]
        if uid == 0:
            powers.append("it is root")
        elif _may_sudo(user.pw_name):
            powers.append("it may use sudo")
        if powers:
            what = f"agents run as `{user.pw_name}`: {', '.join(powers)}: it can take rules and programs off"
            yield Finding(check, State.WEAK, what, "run agents as a user without privileges")
        else:
            yield Finding(check, State.OK, f"`{user.pw_name}` has no privilege that is known")


def _capabilities(document: Document | PolicyError) -> Iterator[Finding]:
    if isinstance(document, PolicyError):
        yield Finding("capabilities of agents", State.SKIPPED, "the policy, which names them, cannot be loaded")
        return
    matcher = AgentMatcher(document.agents)
    for name, complaint in matcher.complaints().items():
        fix = "put the executable where only root can change it, on ext4, xfs or f2fs, or give its `sha256`"
        yield Finding(f"executable of {name}", State.WRONG, f"it makes nobody an agent: {complaint}", fix)
    matcher.close()
    among = powers.running()
    for agent in sorted(document.agents, key=lambda agent: agent.name):
        if not agent.exe:
            continue
        check = f"capabilities of {agent.name}"
        own = powers.processes(agent, among)
        has = [f"`{agent.exe}` {what}" for what in powers.of_file(agent.exe)]
        has += [
            f"process {one.pid} of uid {one.uid} has {', '.join(found)}"
            for one in own
            if (found := powers.names(one.capabilities))
        ]
        if has:
            more = f"; and {len(has) - _TOLD_MAX} more" if len(has) > _TOLD_MAX else ""
            what = f"{'; '.join(has[:_TOLD_MAX])}{more}: what it can do with them is in docs/threat-model.md"
            fix = "take them away: setcap -r, chmod u-s, `CapabilityBoundingSet=`, --cap-drop; run it as a user"
            yield Finding(check, State.WEAK, what, fix)
        else:
            yield Finding(check, State.OK, f"none by its file, none in the {len(own)} processes of it that run now")


def _known_group(gid: int) -> bool:
    try:
        grp.getgrgid(gid)
    except KeyError:
        return False
    return True


def _may_sudo(name: str) -> bool:
    if shutil.which("sudo") is None:
        return False
    try:
        done = subprocess.run(
            ["sudo", "-n", "-l", "-U", name], capture_output=True, text=True, timeout=10, env={"LANG": "C", **_PATH}
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "may run the following" in done.stdout


_PATH = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
