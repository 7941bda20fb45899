"""What real clients do with a cluster, directly and through the gateway: they should not notice.

Every operation is a shell script (`conformance.yaml`). It runs beside the server with the gateway's own token, and as a
job on the runner without one; output, errors and exit status have to be the same, after what is another each time
(identifiers, versions, times) has been made the same.

The policy allows everything. With `MASKS` it also masks, of everything, a field that nothing has: every answer is then
taken apart and put together anew, and has to come to the same. `WORDED` shows what masks do take away, the server's own
words and the columns of custom resources, and is left out.

Blind spots: how long it takes; what a client does not show. What a policy changes is what the end-to-end tests look at.
"""

from __future__ import annotations

import difflib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.e2e.beds import hostile_server
from tests.e2e.clusters import ClusterBed, cluster_bed
from tests.e2e.harbour import shout
from tests.lab.kubernetes import current_kubectl, kubectls

LAB = Path(__file__).parent / "kubernetes"
TIMEOUT_S = 90.0
POLICY = """\
agents:
  job: {exe: /bin/sh}
rules:
  - name: job-does
    agents: job
    targets: cluster
    verbs: "*"
    resources: ["*", "*/*", pods/exec, pods/attach, pods/portforward, pods/eviction, pods/ephemeralcontainers]
    decision: allow
  - {name: job-speaks, agents: job, targets: cluster, verbs: impersonate, resources: [users, groups], decision: allow}
  - {name: job-signs, agents: job, targets: cluster, verbs: create, resources: serviceaccounts/token, decision: allow}
  - {name: job-asks, agents: job, targets: cluster, verbs: "*", paths: "*", decision: allow}
"""

MASKS = """\
  - name: job-sees-less
    agents: job
    targets: cluster
    masks:
      - {resource: "*", field: 'metadata.annotations["example.test/nothing-has-it"]', method: redact}
      - {resource: secrets, names: "nothing-is-called-so-*", method: hide}
"""
WORDED = ("errors", "printed columns")

MANIFEST = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: conformance, labels: {a: b}}
data: {colour: green}
---
apiVersion: v1
kind: Secret
metadata: {name: conformance}
stringData: {token: hunter2}
"""
OPERATIONS: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


@dataclass(frozen=True)
class Client:
    """`command` is what `$C` stands for in its operations, scripts by their names."""

    name: str
    command: str
    operations: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)


def clients() -> Iterator[Client]:
    """Every client that is here. Raises `LabError` when the programs cannot be built."""
    for kubectl in kubectls():
        yield Client(f"kubectl {kubectl.name}", str(kubectl.path), OPERATIONS["kubectl"], kubectl.environment)
    programs = current_kubectl().path.parent
    yield Client("helm", f"{programs}/helm", OPERATIONS["helm"])
    python = f"{sys.executable} -I {LAB}"
    yield Client("Python kubernetes", f"{python}/crud.py", OPERATIONS["crud"])
    yield Client("Python kubernetes", f"{python}/dynamic.py", OPERATIONS["own"])
    for library in ("kubernetes", "kr8s", "lightkube"):
        # lightkube cannot execute
        operations = {k: v for k, v in OPERATIONS["library"].items() if (library, k) != ("lightkube", "exec")}
        yield Client(f"Python {library}", f"{python}/pyclient.py {library} $KUBECONFIG", operations)
    for name, flag in (("JSON", ""), ("protobuf", "-protobuf")):
        command = f"{programs}/goclient -kubeconfig $KUBECONFIG {flag}"
        yield Client(f"Go client-go, {name}", command, OPERATIONS["go"])


_SAME = (
    # old kubectls show them, in an order that depends on whether a second has passed between two changes
    (r"^( *)managedFields:\n(?:\1[ -].*\n)*", ""),
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "UID"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?( [+]\d{4}( UTC)?|Z|[+]\d\d:\d\d)?( m=[+.\d]+)?", "TIME"),
    (r"[EWI]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (\w+\.go):\d+", r"LOG \1"),
    (r"\w{3}, \d+ \w{3} \d{4} \d\d:\d\d:\d\d [+-]\d{4}", "TIME"),
    (r"\w{3} \w{3} +\d+ \d\d:\d\d:\d\d \d{4}", "TIME"),
    (r"(resourceVersion\"?: ?\"?)\d+", r"\1N"),
    (r"\b\d+(\.\d+)?(ms|s|m|m\d+s|h|d)\b", "AGE"),
    (r"(pid|PID)[ =]\d+", "PID"),
    # what the controllers call pods and the volumes of their accounts
    (r"(-[0-9a-f]{8,10}|kube-api-access)-[a-z0-9]{5}\b", r"\1-RANDOM"),
    (r"/tmp/[\w./-]+", "FILE"),
    (r" +$", ""),
    (r"[ \t]+", " "),
)


def made_same(said: str) -> str:
    for pattern, text in _SAME:
        said = re.sub(pattern, text, said, flags=re.MULTILINE)
    return said


def do(bed: ClusterBed, client: Client, script: str, *, direct: bool) -> str:
    """Everything that the client printed, and its exit status."""
    work = bed.directory / ("direct" if direct else "through")
    (work / "t").mkdir(parents=True, exist_ok=True)
    manifest = work / "manifest.yaml"
    manifest.write_text(MANIFEST)
    config = bed.server.write_kubeconfig(work / "kubeconfig", token=bed.server.token) if direct else bed.kubeconfig
    shell = ["/bin/sh", "-c", re.sub(r"\$C\b", lambda _: client.command, script) + "\necho status $?"]
    with subprocess.Popen(
        bed.server.command(shell) if direct else bed.gateway.inside(shell),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        cwd="/",
        env={
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(work),
            "T": str(work / "t"),
            "CHART": str(LAB / "chart"),
            "MANIFEST": str(manifest),
            "KUBECONFIG": str(config),
            **client.environment,
        },
    ) as process:
        try:
            said, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = f"{process.communicate()[0]}not done within {TIMEOUT_S:g} s\n"
    return made_same(said)


@contextmanager
def opened_bed(policy: str = POLICY) -> Iterator[ClusterBed]:
    with ExitStack() as stack:
        bed = stack.enter_context(cluster_bed("conformance", controllers=True))
        assert bed.server.namespace is not None
        stack.enter_context(hostile_server(bed.server.namespace, "127.0.0.1", 8080, shout))
        bed.node.run_pod("shell", ["sh", "-c", "echo started; exec cat"], stdin=True, env={"COLOUR": "green"})
        bed.start(policy)
        yield bed


def differences(bed: ClusterBed, client: Client, operation: str) -> list[str]:
    """The lines that only one of the two ways has; tried once more before it is believed."""
    found: list[str] = []
    for _ in range(2):
        direct, through = (do(bed, client, client.operations[operation], direct=way) for way in (True, False))
        found = [
            line
            for line in difflib.unified_diff(direct.splitlines(), through.splitlines(), lineterm="", n=0)
            if not line.startswith(("---", "+++", "@@"))
        ]
        if not found:
            break
    return found


def chosen(words: Sequence[str], *, masked: bool = False) -> list[tuple[Client, str]]:
    return [
        (client, operation)
        for client in clients()
        for operation in client.operations
        if not words or any(word in f"{client.name} {operation}" for word in words)
        if not (masked and operation in WORDED)
    ]


def main(words: Sequence[str]) -> int:
    if os.geteuid() != 0:
        sys.exit("run as root: the suite makes network namespaces, and the kernel programs need it")
    masked = "--masked" in words
    wanted = chosen([word for word in words if not word.startswith("-")], masked=masked)
    if not wanted:
        sys.exit(f"no client and no operation has one of `{' '.join(words)}` in its name")
    differing = 0
    begun = time.monotonic()
    with opened_bed(POLICY + MASKS * masked) as bed:
        print(f"{'CLIENT':28}{'OPERATION':30}DIRECTLY AND THROUGH THE GATEWAY", flush=True)
        for client, operation in wanted:
            found = differences(bed, client, operation)
            differing += bool(found)
            verdict = f"differs: {found[0][:120]}" if found else "same"
            print(f"{client.name:28}{operation:30}{verdict}", flush=True)
            if found and "--said" in words:
                print("\n".join(f"      {line}" for line in found), flush=True)
    print(f"\n{len(wanted)} operations, {differing} differ, {time.monotonic() - begun:.0f} s")
    return min(differing, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
