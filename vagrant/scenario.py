"""The promises of the nested-agents example, each tried for real and told in a table: expected, seen.

One scenario, two beds to lie in: a lab of network namespaces (`scripts/demo`), and the installed service on a machine
that `vagrant/provision.sh` has made (this file as a program, as root). Needs only the standard library.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

CUSTOMERS = [["Ada", "ada@example.com", "4111111111111111"], ["Grace", "grace@example.com", "5500005555555559"]]
MASKED = "Ada|a***@example.com|***\nGrace|g***@example.com|***"
PATIENCE_S = 30.0


class Bed(Protocol):
    """Where the scenario runs. `agents` is the directory with the agents' programs, `work` one that jobs may write
    to."""

    agents: Path
    work: Path
    password: str
    recordings: Path

    def start_job(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Starts a command as a job on the runner, with the connection string in SHOP_DSN; output on its `stdout`."""

    def hopgate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the command line as root."""

    def kill(self) -> None:
        """Kills the daemon with signal 9."""

    def start(self) -> None:
        """Starts it again where nothing else does, and returns when it serves."""

    def evidence(self) -> Iterable[str]:
        """Everything that the gateway has written: recordings, index, logs."""


class Scenario:
    """Collects the rows."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.rows: list[tuple[str, str, str, bool]] = []
        self.outputs: list[str] = []

    def job(self, *command: str | Path) -> str:
        with self.bed.start_job([str(part) for part in command]) as process:
            output, _ = process.communicate(timeout=60)
        self.outputs.append(output)
        return output.strip()

    def pipeline(self, *job: str) -> str:
        return self.job(self.bed.agents / "pipeline.sh", *job)

    def row(self, promise: str, expected: str, seen: str, kept: bool) -> None:
        """One line of the table, told as soon as it is known."""
        self.rows.append((promise, expected, seen, kept))
        tell(promise, expected, seen, kept)

    def run(self) -> bool:
        """True when every promise was kept."""
        for promise in (
            self.masks,
            self.denials,
            self.hold,
            self.orphan,
            self.unattributed,
            self.kill,
            self.secrecy,
            self.audit,
        ):
            promise()
        return all(kept for *_, kept in self.rows)

    def masks(self) -> None:
        seen = self.pipeline("read")
        kept = _lines(seen) == [{"rows": CUSTOMERS, "tag": "SELECT 2"}]
        self.row("agent A reads", "clear values", seen, kept)
        seen = self.pipeline("start-b", "read")
        self.row("agent B, started by A, sends the same query", MASKED, seen, seen == MASKED)

    def denials(self) -> None:
        seen = self.pipeline("start-b", "drop")
        kept = all(part in seen for part in ("42501", "`agent-b`", "`shop`", "HINT", "still here, 3 orders"))
        self.row("B drops a table", "denied by B's hop (42501); the session goes on: still here, 3 orders", seen, kept)
        seen = self.pipeline("start-cleaner")
        kept = '"42501"' in seen and "`agent-a`" in seen
        self.row("A's child deletes, which A may not", "denied by A's hop (42501)", seen, kept)
        seen = self.job("/usr/bin/python3", self.bed.agents / "cleaner.py")
        self.row("the same program on its own may", "DELETE 1", seen, _lines(seen) == [{"tag": "DELETE 1"}])

    def hold(self) -> None:
        process = self.bed.start_job([str(self.bed.agents / "pipeline.sh"), "update"])
        assert process.stdout is not None
        notice = process.stdout.readline()
        found = re.search(r"H-[A-Z0-9]+", notice)
        approved = self.bed.hopgate("approve", found.group() if found else "none", "--reason", "seen")
        output, _ = process.communicate(timeout=60)
        self.outputs += [notice, output]
        seen = f"{notice.strip()} | hopgate approve: {approved.returncode} | {output.strip()}"
        kept = approved.returncode == 0 and _lines(output) == [{"rows": [], "tag": "UPDATE 1"}]
        self.row("A's UPDATE is held and approved", "a notice with the approval's id, then UPDATE 1", seen, kept)

    def orphan(self) -> None:
        output = self.bed.work / "orphan"
        self.pipeline("start-b", "orphan")
        seen = wait(lambda: output.read_text() if output.exists() else "", lambda text: "parent" in text).strip()
        self.outputs.append(seen)
        parent = seen.rpartition("parent")[2].strip()
        sessions = json.loads(self.bed.hopgate("sessions", "--json").stdout)
        last = max(sessions, key=lambda session: session["id"])
        kept = seen.startswith(MASKED) and last["chain"] == "agent-a > agent-b" and parent not in ("", "0")
        seen = f"{seen} | {last['chain']}"
        self.row("an orphan (double fork, setsid, parent dead)", f"still agent-a > agent-b: {MASKED}", seen, kept)

    def unattributed(self) -> None:
        seen = self.shell()
        self.row("a shell outside any agent", "denied as unattributed", seen, "`unattributed`" in seen)

    def shell(self) -> str:
        return self.job("sh", "-c", 'psql -X -At -d "$SHOP_DSN" -c "SELECT count(*) FROM customers"')

    def kill(self) -> None:
        self.bed.kill()
        seen = self.shell()
        kept = "refused" in seen and "password" not in seen
        self.row("daemon killed with -9: the next connect", "Connection refused", seen, kept)
        self.bed.start()
        seen = wait(lambda: self.pipeline("read"), lambda text: "ada@" in text)
        self.row("and after a restart", "it works", seen, _lines(seen) == [{"rows": CUSTOMERS, "tag": "SELECT 2"}])

    def secrecy(self) -> None:
        self.pipeline("environment")
        self.pipeline("start-b", "environment")
        found = [text[:80] for text in (*self.outputs, *self.bed.evidence()) if self.bed.password in text]
        seen = f"{len(found)} places" + (f": {found[0]}" if found else "")
        self.row("the password in outputs, environments, recordings, logs", "0 places", seen, not found)

    def audit(self) -> None:
        verified = self.bed.hopgate("audit", "verify")
        seen = _flat(verified.stdout + verified.stderr)
        self.row("hopgate audit verify", "holds", seen, verified.returncode == 0)
        recording = max(self.bed.recordings.rglob("*.hgr"), key=lambda path: path.stat().st_size)
        with recording.open("r+b") as file:
            file.seek(recording.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        try:
            verified = self.bed.hopgate("audit", "verify")
        finally:
            with recording.open("r+b") as file:
                file.seek(recording.stat().st_size // 2)
                file.write(byte)
        seen = _flat(verified.stdout + verified.stderr)
        kept = verified.returncode == 1 and recording.stem in seen
        self.row("one byte of a recording is changed", "fails, and names the session", seen, kept)


def _lines(output: str) -> list[object]:
    """The JSON values of an agent's output; what is no JSON stays text."""

    def value(line: str) -> object:
        try:
            return json.loads(line)
        except ValueError:
            return line

    return [value(line) for line in output.splitlines() if line.strip()]


def _flat(text: str) -> str:
    return " ".join(text.split())


def wait(look: Callable[[], str], good: Callable[[str], bool]) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while not good(seen := look()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return seen


def tell(promise: str, expected: str, seen: str, kept: bool) -> None:
    """Prints a row in the width of the terminal, nothing cut off."""
    columns = shutil.get_terminal_size((150, 24)).columns
    widths = (26, 34, max(40, columns - 26 - 34 - 5 - 9), 5)
    cells = [
        [line[i : i + width] for line in text.splitlines() or [""] for i in range(0, max(len(line), 1), width)]
        for text, width in zip((promise, expected, seen, "ok" if kept else "WRONG"), widths, strict=True)
    ]
    for i in range(max(map(len, cells))):
        parts = [(cell[i] if i < len(cell) else "").ljust(width) for cell, width in zip(cells, widths, strict=True)]
        print(" │ ".join(parts).rstrip(), flush=True)
    print("─" * min(columns, sum(widths) + 9), flush=True)


def perform(bed: Bed) -> int:
    """Runs the scenario; the exit status is 0 when every promise was kept."""
    print()
    tell("promise", "expected", "seen", True)
    scenario = Scenario(bed)
    kept = scenario.run()
    wrong = sum(not row[3] for row in scenario.rows)
    print(
        f"{len(scenario.rows)} promises, {wrong} not kept"
        if not kept
        else f"all {len(scenario.rows)} promises were kept"
    )
    return 0 if kept else 1


class InstalledBed:
    """The systemd service, and jobs of the user `runner`, who has no password of anything."""

    agents = Path("/opt/agents")
    recordings = Path("/var/lib/hopgate/recordings")
    dsn = "host=192.0.2.10 dbname=shop user=agent sslmode=require"

    def __init__(self, work: Path) -> None:
        self.work = work
        credential = Path("/etc/hopgate/credentials/shop").read_text()
        self.password = re.search(r'^password: "(.*)"$', credential, re.M).group(1)  # type: ignore[union-attr]

    def start_job(self, command: Sequence[str]) -> subprocess.Popen[str]:
        environment = {
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "SHOP_DSN": self.dsn,
            "ORPHAN_OUTPUT": str(self.work / "orphan"),
            "AGENT_PYTHON": "/usr/bin/python3",
        }
        return subprocess.Popen(
            ["/usr/sbin/runuser", "-u", "runner", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def hopgate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["hopgate", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )

    def kill(self) -> None:
        subprocess.run(["systemctl", "kill", "-s", "KILL", "hopgate"], check=True)

    def start(self) -> None:
        """systemd does: the next job waits for it."""

    def evidence(self) -> Iterable[str]:
        for path in (*self.recordings.rglob("*"), *Path("/var/lib/hopgate").glob("*.sqlite*")):
            if path.is_file():
                yield f"{path}: {path.read_bytes().decode(errors='replace')}"
        yield subprocess.run(["journalctl", "--no-pager"], capture_output=True, text=True, check=True).stdout


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        work.chmod(0o711)
        jobs = work / "jobs"
        jobs.mkdir()
        shutil.chown(jobs, "runner")
        return perform(InstalledBed(jobs))


if __name__ == "__main__":
    sys.exit(main())
