"""Matches process images to the policy's agents.

The executable is compared as the file it is (device and inode, as the kernel names them), never by a path that a
process chose. A file that others could have put there or written makes nobody an agent; that is logged. One that
the policy gives a digest of may be somebody else's, if it is where every write leaves a trace (`files.settled_sha256`).

Where a condition cannot be told (cgroup gone, file changed after the process started), the image is not quietly "no
agent", which would give it what its parent may do: `Undecidable` is raised. Arguments are another matter: whoever
starts a process chooses them, so they narrow a match and prove nothing; the pattern is held against the head that the
kernel keeps (`bpf/abi.h`), and an image that does not show it there has its parent's rights and no more.

An image that was declared to be an agent (`hostagent/declarations.py`) is that agent. If the policy no longer has it,
or no longer lets anybody declare it, that is `Undecidable` too.

If several agents match one image, all of them count, in the order of their names: the policy meets over all hops.

On btrfs and bcachefs anybody can make a file that the kernel names like another one. What may be an agent whose file is
there is `Undecidable`.

A file that made processes an agent, and was replaced, removed or opened to others since, makes them `Undecidable`: who
owns it could otherwise put his own processes outside of the agent, with more than that.

Blind spots: uid and cgroup are those at execve. What became of files before the start is not known. For a script the
executable is its interpreter; the script is in the arguments, which whoever starts the process chooses.
"""

from __future__ import annotations

import fnmatch
import os
import stat
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from hostagent.attribution import files
from proxy.model import Chain, ProcessImage
from proxy.policy.document import Agent

log = structlog.get_logger()

_FORMER_MAX = 4096
_FORMER_FDS_MAX = 64
"""Of one agent. Beyond these, the number of a file that is gone may come to mean another."""
RECHECK_S = 1.0
"""How long the identity of an executable is believed without looking at the file again."""


class Undecidable(Exception):
    """Whether an image is an agent cannot be told. The message says why."""


@dataclass(frozen=True, slots=True)
class _File:
    """The file at an agent's path. `names` are all (device, inode) that mean it; empty when it makes nobody an
    agent."""

    names: frozenset[tuple[int, int]]
    changed_ns: int
    """CLOCK_REALTIME of the latest change, for files that somebody else than root could change; 0 for root's own."""


_NOBODY = _File(frozenset(), 0)


@dataclass(slots=True)
class _Executable:
    """Keeps the file of one agent: held open, so that its inode cannot come to mean another file."""

    agent: Agent
    fd: int = -1
    status: os.stat_result | None = None
    sha256: str = ""
    file: _File = field(default_factory=lambda: _NOBODY)
    former: OrderedDict[tuple[int, int], None] = field(default_factory=OrderedDict)
    """Names of files that made processes this agent, and do not any more."""
    former_fds: deque[int] = field(default_factory=deque)
    checked_s: float = float("-inf")
    complaint: str = ""

    def release(self) -> None:
        """Lets go of the file, but for its inode: a name that is remembered must not come to mean another file."""
        if self.fd >= 0:
            self.former_fds.append(self.fd)
        if len(self.former_fds) > _FORMER_FDS_MAX:
            os.close(self.former_fds.popleft())
        self.fd, self.status = -1, None

    def remember(self, names: Iterable[tuple[int, int]]) -> None:
        self.former.update(dict.fromkeys(names))
        while len(self.former) > _FORMER_MAX:
            self.former.popitem(last=False)

    def take_over(self, other: _Executable) -> None:
        """Remembers what the same agent of an earlier policy does."""
        self.remember([*other.former, *other.file.names])
        self.former_fds.extend(os.dup(fd) for fd in (*other.former_fds, other.fd) if fd >= 0)

    def close(self) -> None:
        self.release()
        while self.former_fds:
            os.close(self.former_fds.popleft())


class AgentMatcher:
    """The agents of one policy version. `declarable` are those that can be declared, with who may; `intercepted` are
    those for whose chains all connections are looked at."""

    def __init__(self, agents: Iterable[Agent], before: AgentMatcher | None = None) -> None:
        """`before` is the matcher of the policy that this one follows."""
        by_name = sorted(agents, key=lambda agent: agent.name)
        self._executables = [_Executable(agent) for agent in by_name if agent.exe]
        earlier = {(one.agent.name, one.agent.exe): one for one in before._executables} if before is not None else {}
        for executable in self._executables:
            if known := earlier.get((executable.agent.name, executable.agent.exe)):
                executable.take_over(known)
        self._names = frozenset(agent.name for agent in by_name)
        self.executables = tuple(executable.agent.exe for executable in self._executables)
        self.intercepted = frozenset(agent.name for agent in by_name if agent.intercept == "all")
        self.declarable: dict[str, tuple[str, ...]] = {
            agent.name: agent.declared_by for agent in by_name if agent.declared_by
        }

    def match(self, image: ProcessImage) -> tuple[str, ...]:
        """Names of the agents that the image is, sorted; raises `Undecidable`."""
        names = {executable.agent.name for executable in self._executables if self._is(executable, image)}
        if image.declared:
            if image.declared not in self.declarable:
                raise Undecidable(
                    f"process `{image.tgid}` was declared to be agent `{image.declared}`: no such agent can be now"
                )
            names.add(image.declared)
        return tuple(sorted(names))

    def look(self) -> None:
        """Looks at the files: to be called every second, so that none is replaced twice unseen."""
        for executable in self._executables:
            _current(executable)

    def complaints(self) -> dict[str, str]:
        """Why files of agents make nobody an agent, by the agents' names."""
        self.look()
        return {one.agent.name: f"`{one.agent.exe}` {one.complaint}" for one in self._executables if one.complaint}

    def intercepted_files(self) -> frozenset[tuple[int, int]]:
        """Device and inode of the executables that make a process an intercepted agent, whatever else has to hold."""
        return frozenset(
            name
            for executable in self._executables
            if executable.agent.name in self.intercepted
            for name in (*_current(executable).names, *executable.former)
        )

    def why_not_declare(self, agent: str, chain: Chain, uid: int) -> str:
        """Why the process at the end of the chain, which runs as `uid`, may not declare itself to be the agent; empty
        when it may. An agent may declare what names it; a user may only outside of any agent, and only if the process
        was that user's when it was started."""
        if agent not in self.declarable:
            known = agent in self._names
            return f"agent `{agent}` has no `declared_by`" if known else f"the policy has no agent `{agent}`"
        asking = chain.lineage[-1]
        running = {hop.agent for hop in chain.hops if asking.node in hop.nodes}
        granted = self.declarable[agent]
        if running.intersection(granted):
            return ""
        if not chain.hops and asking.uid == uid and f"uid:{uid}" in granted:
            return ""
        whose = str(chain) if chain.hops else f"uid {uid}, outside of any agent"
        return f"{whose} may not declare agent `{agent}`: `declared_by` names {', '.join(granted)}"

    def close(self) -> None:
        for executable in self._executables:
            executable.close()

    def __del__(self) -> None:
        self.close()

    def _is(self, executable: _Executable, image: ProcessImage) -> bool:
        agent = executable.agent
        if agent.uid is not None and agent.uid != image.uid:
            return False
        file = _current(executable)
        name = image.device, image.inode
        if name not in file.names and name not in executable.former:
            return False
        cgroup = not agent.cgroup or bool(image.cgroup and fnmatch.fnmatchcase(image.cgroup, agent.cgroup))
        if not cgroup and image.cgroup:
            return False
        if agent.argv and not fnmatch.fnmatchcase(" ".join(image.argv), agent.argv):
            return False
        if name not in file.names:
            raise Undecidable(
                f"`{agent.exe}` of agent `{agent.name}` was replaced, or is not to be trusted any more, and process "
                f"`{image.tgid}` runs what it was: {executable.complaint or 'start that anew'}"
            )
        if not cgroup:
            raise Undecidable(f"the cgroup of process `{image.tgid}` is gone; agent `{agent.name}` is told by it")
        if file.changed_ns and file.changed_ns > files.wall_ns(image.start_ns):
            raise Undecidable(f"`{agent.exe}` of agent `{agent.name}` was changed after process `{image.tgid}` started")
        return True


# --- the file ---------------------------------------------------------------------------------------------------------


class _Untrusted(Exception):
    pass


def _current(executable: _Executable) -> _File:
    now_s = time.monotonic()
    if now_s - executable.checked_s < RECHECK_S:
        return executable.file
    executable.checked_s = now_s
    before = executable.file
    try:
        executable.file = _look(executable)
        complaint = ""
    except (OSError, files.Unsettled, _Untrusted) as error:
        executable.file = _NOBODY
        complaint = str(error)
    executable.remember(before.names - executable.file.names)
    for name in executable.file.names:
        executable.former.pop(name, None)
    if complaint and complaint != executable.complaint:
        log.warning(
            "executable makes nobody an agent", agent=executable.agent.name, exe=executable.agent.exe, why=complaint
        )
    executable.complaint = complaint
    return executable.file


def _look(executable: _Executable) -> _File:
    """Raises `OSError`, `_Untrusted`."""
    agent = executable.agent
    status = os.stat(agent.exe)
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        raise _Untrusted("is no regular file, or is empty")
    if executable.status is None or files.version(status) != files.version(executable.status):
        executable.release()
        executable.fd = os.open(agent.exe, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        executable.status = status = os.fstat(executable.fd)
        executable.sha256 = ""
    if status.st_mode & 0o022:
        raise _Untrusted("can be written by group or others")
    roots_own = status.st_uid == 0 and all(map(_only_root_puts_files_into, Path(os.path.realpath(agent.exe)).parents))
    if agent.sha256 and not executable.sha256:
        take = files.sha256 if roots_own else files.settled_sha256
        digest = take(executable.fd, status.st_size)
        if files.version(os.fstat(executable.fd)) != files.version(executable.status):
            raise files.Unsettled("was changed while it was read")
        executable.sha256 = digest
    if executable.sha256 != agent.sha256.lower():
        raise _Untrusted(f"has the sha256 `{executable.sha256}`, not that of the policy")
    if not roots_own and not agent.sha256:
        raise _Untrusted("others than root can replace it, and the policy gives no sha256")
    mapped = files.mapped(executable.fd)
    if mapped is None:
        raise _Untrusted("cannot be mapped")
    names = frozenset({(status.st_dev, status.st_ino), mapped})
    if files.file_system(executable.fd) in files.NUMBERED_TWICE:
        executable.remember(names)
        raise _Untrusted("is on btrfs or bcachefs, where others can make files that the kernel names alike")
    return _File(names, 0 if roots_own else status.st_ctime_ns)


def _only_root_puts_files_into(directory: Path) -> bool:
    status = directory.stat()
    # in a sticky directory nobody can replace what is root's
    return status.st_uid == 0 and (not status.st_mode & 0o022 or bool(status.st_mode & stat.S_ISVTX))
