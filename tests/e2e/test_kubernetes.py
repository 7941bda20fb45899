"""What the policy says of requests to an API server is what kubectl prints, and what the server gets."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.recording.records import Decided
from tests.e2e.harbour import (
    DATABASE_PORT,
    OTHER_PORT,
    POD,
    WEB_PORT,
    Harbour,
    Hops,
    Lines,
    forwarded,
    spoken,
    until,
)
from tests.lab.kubernetes import current_kubectl, oldest_kubectl

FORBIDDEN = "Error from server (Forbidden): "
ASK = "ask those who keep the policy for a rule that allows"
DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "web", "namespace": "shop"},
    "spec": {
        "replicas": 1,
        "selector": {"matchLabels": {"app": "web"}},
        "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "main", "image": "hopgate.test/web:1"}]},
        },
    },
}


@pytest.fixture
def configmap(harbour: Harbour) -> Iterator[str]:
    harbour.server.kubectl("create", "configmap", "fruit", "--from-literal=a=apple")
    yield "fruit"
    harbour.server.kubectl("delete", "configmap", "fruit", "--ignore-not-found")


@pytest.fixture
def deployment(harbour: Harbour) -> Iterator[str]:
    harbour.server.kubectl("apply", "-f", "-", stdin=json.dumps(DEPLOYMENT))
    yield "web"
    harbour.server.kubectl("delete", "deployment", "web", "-n", "shop", "--ignore-not-found")


def data(harbour: Harbour, name: str = "fruit") -> object:
    answer = harbour.server.request("GET", f"/api/v1/namespaces/default/configmaps/{name}")
    return answer.json().get("data") if answer.status == 200 else None


# --- allowed and denied -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hops, command, said",
    [
        (
            "reader",
            "get secrets",
            f"agent `reader` may not list secrets in default (no rule allows it); {ASK} `list secrets` there",
        ),
        (
            "limited",
            "delete configmap fruit",
            "agent `limited` may not delete configmaps/fruit in default (rule `limited-deletes-nothing`); "
            "ConfigMaps stay: ask the harbour master",
        ),
        (
            "limited",
            "delete configmaps --all",
            "agent `limited` may not delete configmaps/fruit in default (rule `limited-deletes-nothing`); "
            "ConfigMaps stay: ask the harbour master",
        ),
        (
            "limited",
            "get configmaps -n kube-system",
            "agent `limited` may not list configmaps in kube-system (no rule allows it); "
            f"{ASK} `list configmaps` there",
        ),
        (
            "limited",
            "get pods --all-namespaces",
            f"agent `limited` may not list pods (no rule allows it); {ASK} `list pods` there",
        ),
        (
            "reader",
            "get --raw /metrics",
            f"agent `reader` may not get /metrics (no rule allows it); {ASK} `get /metrics` there",
        ),
        (
            ["reader", "full"],
            "delete configmap fruit",
            "agent `reader` may not delete configmaps/fruit in default (no rule allows it); "
            f"{ASK} `delete configmaps` there",
        ),
        (
            ["full", "reader"],
            "delete configmap fruit",
            "agent `reader` may not delete configmaps/fruit in default (no rule allows it); "
            f"{ASK} `delete configmaps` there",
        ),
        (
            ["full", "limited", "full"],
            "delete configmap fruit",
            "agent `limited` may not delete configmaps/fruit in default (rule `limited-deletes-nothing`); "
            "ConfigMaps stay: ask the harbour master",
        ),
        (
            [],
            "get pods",
            "agent `unattributed` may not log in (no rule allows it anything here); "
            "ask those who keep the policy for a rule that names this agent and target",
        ),
        (
            "nothing",
            "get pods",
            "agent `nothing` may not log in (no rule allows it anything here); "
            "ask those who keep the policy for a rule that names this agent and target",
        ),
        (
            ["full", "nothing"],
            "get pods",
            "agent `nothing` may not log in (no rule allows it anything here); "
            "ask those who keep the policy for a rule that names this agent and target",
        ),
    ],
    ids=str,
)
def test_a_denial_is_a_sentence(harbour: Harbour, configmap: str, hops: Hops, command: str, said: str) -> None:
    done = harbour.kubectl(hops, *command.split())
    assert done.returncode == 1
    assert done.stdout == ""
    (last,) = [line for line in done.stderr.splitlines() if line.startswith("Error from server")]
    assert last == f"{FORBIDDEN}target `cluster`: {said}"
    assert data(harbour) == {"a": "apple"}


def test_who_may_nothing_is_told_so_by_the_first_discovery(harbour: Harbour, tmp_path: Path) -> None:
    """Without a cache kubectl begins with `/api`, where it reads no `Status`."""
    for hops, agent in (("nothing", "nothing"), ([], "unattributed")):
        done = harbour.kubectl(hops, "get", "pods", HOME=str(tmp_path))
        assert f"{FORBIDDEN}target `cluster`: agent `{agent}` may not log in" in done.stderr, done.stderr


def test_what_is_allowed_is_as_without_a_gateway(harbour: Harbour, configmap: str) -> None:
    for arguments in (["get", "pods", "-o", "name"], ["get", "configmap", "fruit", "-o", "yaml"]):
        done = harbour.kubectl(["full", "limited"], *arguments)
        assert (done.stdout, done.stderr, done.returncode) == (
            harbour.server.kubectl(*arguments),
            "",
            0,
        )
    assert harbour.kubectl("limited", "patch", "configmap", "fruit", "-p", '{"data":{"b":"plum"}}').returncode == 0
    assert data(harbour) == {"a": "apple", "b": "plum"}


def test_a_connection_goes_on_after_a_denial(harbour: Harbour) -> None:
    asked = b"GET /api/v1/namespaces/default/%b HTTP/1.1\r\nHost: cluster\r\nConnection: %b\r\n\r\n"
    answered = harbour.converse_once(
        "reader",
        asked % (b"pods", b"keep-alive"),
        (b"\r\n0\r\n\r\n",),
        asked % (b"secrets", b"keep-alive"),
        (b'"code":403}',),
        asked % (b"configmaps", b"close"),
    )
    assert answered.statuses == [200, 403, 200]


def test_the_server_gets_what_was_allowed_and_nothing_else(harbour: Harbour, configmap: str) -> None:
    """The server's own audit log against the rulings in the recordings: the same requests in the same order."""
    size, mark = harbour.server.audit_size(), harbour.mark()
    for hops, *arguments in [
        ("limited", "get", "pods"),
        ("limited", "get", "secrets"),
        ("limited", "delete", "configmap", "fruit"),
        ("limited", "label", "configmap", "fruit", "a=b"),
        (["limited", "full"], "create", "configmap", "more"),
        (["full", "limited"], "create", "secret", "generic", "none"),
        ("nothing", "get", "pods"),
        ("full", "delete", "configmap", "more"),
        ("debugger", "exec", POD, "--", "ls"),
        ("debugger", "exec", POD, "--", "id"),
        ("debugger", "logs", POD),
    ]:
        harbour.kubectl(hops, *arguments)
    ruled = harbour.ruled_since(mark)
    denied = [record.text for record in ruled if record.decision != "allow"]
    assert {text.split(" in ")[0] for text in denied} >= {
        "list secrets",
        "delete configmaps/fruit",
        "create secrets/none",
        "create pods/shell exec",
    }
    allowed = [record.text.split(" ")[:2] for record in ruled if record.decision == "allow"]
    # discovery is no object's
    expected = sorted(_told(verb, resource) for verb, resource in allowed if not resource.startswith("/"))
    got = until(
        lambda: found if len(found := sorted(_audited(harbour, size))) == len(expected) else None,
        f"{len(expected)} requests in the server's log: {_audited(harbour, size)}",
    )
    assert got == expected
    assert not any("secrets" in line or "nothing" in line for line in got)


def _told(verb: str, resource: str) -> str:
    return f"{verb} {resource.split('/')[0].split('.')[0]}"


def _audited(harbour: Harbour, size: int) -> list[str]:
    """What connects is a `create` to the policy and by its method to the server."""
    return [
        f"{'create' if 'exec' in uri.split('?')[0] else verb} {resource}"
        for verb, uri in harbour.audited(size)
        for resource in [re.sub(r"/api(s/[a-z.]+)?/v1/(namespaces/[a-z]+/)?", "", uri).split("?")[0].split("/")[0]]
    ]


# --- holds ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(harbour: Harbour, *arguments: str, hops: Hops = "held") -> Iterator[subprocess.Popen[str]]:
    with harbour.start(hops, *arguments) as process:
        yield process
    until(lambda: not harbour.pending(), "nothing pending")


PATCH = ("patch", "configmap", "fruit", "--type=merge", "-p", '{"data":{"a":"pear"}}')


def outcomes(harbour: Harbour, mark: int) -> list[str]:
    return [
        record.outcome
        for row in harbour.sessions_since(mark)
        for record in harbour.records(row)
        if isinstance(record, Decided)
    ]


def test_a_hold_is_approved_on_a_diff(harbour: Harbour, deployment: str) -> None:
    mark = harbour.mark()
    with held(harbour, "set", "image", "-n", "shop", "deployment/web", "main=hopgate.test/web:2") as process:
        waiting = harbour.await_pending()
        assert image(harbour) == "hopgate.test/web:1"
        shown = [" ".join(line.split()) for line in waiting.preview.splitlines()]
        assert {"- image: hopgate.test/web:1", "+ image: hopgate.test/web:2"} <= {*shown}, waiting.preview
        assert (waiting.hop, waiting.rule) == ("held", "held-changes")
        listed = harbour.gateway.cli("approvals").stdout
        assert waiting.id in listed and re.search(r"\n  \+ +image: hopgate\.test/web:2\n", listed), listed
        harbour.gateway.cli("approve", waiting.id, "--reason", "it was built today")
        said = process.communicate(timeout=20)[0]
    assert "deployment.apps/web image updated" in said
    assert "Warning: approved by root (uid 0): it was built today" in said
    assert image(harbour) == "hopgate.test/web:2"
    assert outcomes(harbour, mark) == ["approved"]


def test_a_hold_is_denied(harbour: Harbour, configmap: str) -> None:
    mark, size = harbour.mark(), harbour.server.audit_size()
    with held(harbour, *PATCH) as process:
        harbour.gateway.cli("deny", harbour.await_pending().id, "--reason", "no pears on a Friday")
        said = process.communicate(timeout=20)[0]
    assert process.returncode == 1
    assert said.startswith(FORBIDDEN) and "no pears on a Friday" in said
    assert data(harbour) == {"a": "apple"}
    assert outcomes(harbour, mark) == ["denied"]
    changes = [uri for verb, uri in harbour.audited(size) if verb == "patch"]
    assert changes and all("dryRun=All" in uri for uri in changes)


@pytest.mark.parametrize(
    "arguments, shown",
    [
        (("create", "configmap", "fresh", "--from-literal=k=v"), "+  k: v"),
        (("delete", "configmap", "fruit"), "-  a: apple"),
        (PATCH, "+  a: pear"),
        (("label", "configmap", "fruit", "ripe=yes"), "ripe"),
        (("annotate", "configmap", "fruit", "ripe=yes"), "ripe"),
        (("create", "secret", "generic", "quiet", "--from-literal=k=hunter2"), "quiet"),
    ],
    ids=" ".join,
)
def test_the_approver_sees_what_would_come_of_it(
    harbour: Harbour, configmap: str, arguments: tuple[str, ...], shown: str
) -> None:
    with held(harbour, *arguments) as process:
        waiting = harbour.await_pending()
        harbour.decide(waiting.id, False)
        said = process.communicate(timeout=20)[0]
    assert shown in waiting.preview
    assert "hunter2" not in waiting.preview and "aHVudGVyMg" not in waiting.preview
    assert FORBIDDEN in said or "Forbidden" in said or "failed to create" in said
    assert data(harbour) == {"a": "apple"} and data(harbour, "fresh") is None


def test_time_denies(harbour: Harbour) -> None:
    mark = harbour.mark()
    done = harbour.kubectl("held", "delete", "pod", POD)
    assert done.returncode == 1
    assert "expired" in done.stderr and "held-is-late" in done.stderr
    assert outcomes(harbour, mark) == ["expired"]
    assert harbour.server.request("GET", f"/api/v1/namespaces/default/pods/{POD}").status == 200


def test_control_c_withdraws(harbour: Harbour, configmap: str) -> None:
    mark = harbour.mark()
    with held(harbour, *PATCH) as process:
        waiting = harbour.await_pending()
        # every launcher execs: the process is kubectl itself
        assert Path(f"/proc/{process.pid}/comm").read_text().startswith("kubectl")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        until(lambda: not harbour.pending(), "nothing pending")
    assert harbour.gateway.cli("approve", waiting.id, check=False).returncode == 1
    assert data(harbour) == {"a": "apple"}
    assert outcomes(harbour, mark) == ["withdrawn"]


def test_a_child_of_a_held_agent_is_held_too(harbour: Harbour, configmap: str) -> None:
    with held(harbour, *PATCH, hops=["held", "full"]) as process:
        waiting = harbour.await_pending()
        assert waiting.hop == "held"
        harbour.decide(waiting.id, True)
        process.communicate(timeout=20)
    assert data(harbour) == {"a": "pear"}


def test_a_shell_waits_for_a_human(harbour: Harbour) -> None:
    for kubectl in (current_kubectl(), oldest_kubectl()):
        with harbour.start("held", "exec", POD, "--", "echo", "in", kubectl=kubectl) as process:
            waiting = harbour.await_pending()
            assert "exec" in waiting.preview and "echo in" in waiting.preview
            harbour.decide(waiting.id, True)
            assert "in\n" in process.communicate(timeout=20)[0]


# --- conditions on bodies ---------------------------------------------------------------------------------------------


def changed(**container: object) -> str:
    made = json.loads(json.dumps(DEPLOYMENT))
    made["spec"]["template"]["spec"]["containers"][0].update(container)
    return json.dumps(made)


def with_another_container() -> str:
    made = json.loads(json.dumps(DEPLOYMENT))
    made["spec"]["template"]["spec"]["containers"].append({"name": "side", "image": "evil.example/x"})
    return json.dumps(made)


def with_host_path() -> str:
    made = json.loads(json.dumps(DEPLOYMENT))
    made["spec"]["template"]["spec"]["volumes"] = [{"name": "root", "hostPath": {"path": "/"}}]
    return json.dumps(made)


def image(harbour: Harbour) -> str:
    answer = harbour.server.request("GET", "/apis/apps/v1/namespaces/shop/deployments/web")
    containers = answer.json()["spec"]["template"]["spec"]["containers"]
    assert len(containers) == 1
    return str(containers[0]["image"])


def test_an_image_of_the_registry_is_rolled_out(harbour: Harbour) -> None:
    done = harbour.kubectl("deployer", "apply", "-f", "-", stdin=json.dumps(DEPLOYMENT))
    assert done.stdout == "deployment.apps/web created\n"
    done = harbour.kubectl("deployer", "apply", "-f", "-", stdin=changed(image="hopgate.test/web:2"))
    assert done.stdout == "deployment.apps/web configured\n"
    done = harbour.kubectl("deployer", "set", "image", "-n", "shop", "deployment/web", "main=hopgate.test/web:3")
    assert done.returncode == 0, done.stderr
    done = harbour.kubectl(
        "deployer",
        *("apply", "--server-side", "--force-conflicts", "-f", "-"),
        stdin=changed(image="hopgate.test/web:4"),
    )
    assert done.returncode == 0, done.stderr
    assert image(harbour) == "hopgate.test/web:4"
    harbour.server.kubectl("delete", "deployment", "web", "-n", "shop")


EVIL = {"image": "evil.example/x"}
STRATEGIC = json.dumps({"spec": {"template": {"spec": {"containers": [{"name": "main", **EVIL}]}}}})


@pytest.mark.parametrize(
    "arguments, stdin",
    [
        ("apply -f -", changed(**EVIL)),
        ("apply --server-side --force-conflicts -f -", changed(**EVIL)),
        ("apply -f -", with_another_container()),
        ("apply -f -", with_host_path()),
        ("replace -f -", changed(**EVIL)),
        ("replace -f -", with_host_path()),
        ("create -f -", changed(**EVIL).replace('"web"', '"other"')),
        ("create -f -", with_another_container().replace('"web"', '"other"')),
        ("set image -n shop deployment/web main=evil.example/x", ""),
        (f"patch deployment web -n shop --type=strategic -p {STRATEGIC.replace(' ', '')}", ""),
        (f"patch deployment web -n shop --type=merge -p {STRATEGIC.replace(' ', '')}", ""),
        (
            "patch deployment web -n shop --type=json -p "
            '[{"op":"replace","path":"/spec/template/spec/containers/0/image","value":"evil.example/x"}]',
            "",
        ),
        (
            "patch deployment web -n shop --type=json -p "
            '[{"op":"add","path":"/spec/template/spec/containers/-","value":{"name":"b","image":"evil.example/x"}}]',
            "",
        ),
        ("scale deployment web -n shop --replicas=5", ""),
    ],
    ids=lambda word: word[:60].strip("{"),
)
def test_another_image_is_rolled_out_in_no_way(harbour: Harbour, deployment: str, arguments: str, stdin: str) -> None:
    mark = harbour.mark()
    done = harbour.kubectl("deployer", *arguments.split(), stdin=stdin)
    assert done.returncode == 1
    assert "agent `deployer` may not" in done.stderr, done.stderr
    assert image(harbour) == "hopgate.test/web:1"
    assert harbour.server.request("GET", "/apis/apps/v1/namespaces/shop/deployments/other").status == 404
    assert [record.decision for record in harbour.ruled_since(mark)].count("deny") >= 1


# --- ports and commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speaks", ["websocket", "spdy"])
def test_a_port_forward_reaches_what_the_policy_says(harbour: Harbour, speaks: str) -> None:
    kubectl = current_kubectl() if speaks == "websocket" else oldest_kubectl()
    mark = harbour.mark()
    with forwarded(harbour, "debugger", [WEB_PORT, OTHER_PORT], kubectl=kubectl) as (ports, lines):
        assert spoken(harbour, ports[WEB_PORT], b"hello") == b"HELLO"
        assert spoken(harbour, ports[OTHER_PORT], b"hello") == b""
        lines.await_text("agent `debugger` may not")
    # port 5432 is protected: a rule that names no port does not open it
    with forwarded(harbour, "full", [DATABASE_PORT, OTHER_PORT], kubectl=kubectl) as (ports, lines):
        assert spoken(harbour, ports[DATABASE_PORT], b"hello") == b""
        lines.await_text("agent `full` may not")
        # what comes after a denial fares as after any other failure: kubectl may end then
        if kubectl.speaks_spdy:
            assert spoken(harbour, ports[OTHER_PORT], b"hello") in (b"HELLO", b"")
    ruled = [record for record in harbour.ruled_since(mark) if record.kind == "forward"]
    found = {(int(record.text.rsplit(" ", 1)[1]), record.decision) for record in ruled}
    assert found >= {(WEB_PORT, "allow"), (OTHER_PORT, "deny"), (DATABASE_PORT, "deny")}


def test_a_port_forward_to_a_database_waits_for_a_human(harbour: Harbour) -> None:
    with forwarded(harbour, "held", [DATABASE_PORT]) as (ports, _lines):
        said: list[bytes] = []
        thread = threading.Thread(target=lambda: said.append(spoken(harbour, ports[DATABASE_PORT], b"hello")))
        thread.start()
        waiting = harbour.await_pending()
        assert "5432" in waiting.preview
        time.sleep(0.2)
        assert not said
        harbour.decide(waiting.id, True)
        thread.join(20)
        assert said == [b"HELLO"]


@pytest.mark.parametrize("speaks", ["websocket", "spdy"])
def test_exec_runs_the_commands_of_the_policy(harbour: Harbour, speaks: str) -> None:
    kubectl = current_kubectl() if speaks == "websocket" else oldest_kubectl()
    done = harbour.kubectl("debugger", "exec", POD, "--", "echo", "a", "b", kubectl=kubectl)
    assert (done.stdout, done.returncode) == ("a b\n", 0), done.stderr
    for command in (["sh", "-c", "id"], ["ls"], ["id", "-u"], ["/usr/bin/id"]):
        done = harbour.kubectl("debugger", "exec", POD, "--", *command, kubectl=kubectl)
        assert done.returncode == 1 and done.stdout == ""
        assert "agent `debugger` may not create pods/shell exec in default (no rule allows it)" in done.stderr
    for arguments in (["attach", POD], ["cp", f"{POD}:x", "/nonexistent"]):
        done = harbour.kubectl("debugger", *arguments, kubectl=kubectl)
        assert done.returncode == 1
        assert "agent `debugger` may not" in done.stderr, done.stderr


# --- who is asking ----------------------------------------------------------------------------------------------------


def test_acting_as_somebody_is_a_request_of_its_own(harbour: Harbour) -> None:
    for hops, *arguments, said in [
        ("full", "--as=jane", "agent `full` may not impersonate users/jane (no rule allows it)"),
        ("speaker", "--as=joe", "agent `speaker` may not impersonate users/joe (no rule allows it)"),
        ("speaker", "--as=jane", "--as-group=system:masters", "may not impersonate groups/system:masters"),
        ("speaker", "--as=jane", "--as-uid=1", "may not impersonate uids.authentication.k8s.io/1"),
        ("speaker", "--as=system:serviceaccount:kube-system:boss", "may not impersonate serviceaccounts/boss"),
        (["speaker", "full"], "--as=jane", "agent `full` may not impersonate users/jane (no rule allows it)"),
    ]:
        done = harbour.kubectl(hops, "get", "pods", *arguments)
        assert done.returncode == 1 and said in done.stderr, done.stderr
    # the server's own word: it is jane who may not
    done = harbour.kubectl("speaker", "get", "pods", "--as=jane")
    assert 'User "jane" cannot list resource "pods"' in done.stderr


def test_tokens_are_for_those_who_may_make_them(harbour: Harbour) -> None:
    harbour.server.create("/api/v1/namespaces/shop/serviceaccounts", {"metadata": {"name": "robot"}})
    done = harbour.kubectl("limited", "create", "token", "robot", "-n", "shop")
    assert "agent `limited` may not create serviceaccounts/robot token in shop" in done.stderr
    done = harbour.kubectl("full", "create", "token", "robot", "-n", "shop")
    token = done.stdout.strip()
    assert token.count(".") == 2
    for what, written in harbour.everything_written():
        assert token.encode() not in written, what


def test_what_may_i_is_answered_by_the_server(harbour: Harbour) -> None:
    assert harbour.kubectl("reader", "auth", "can-i", "delete", "pods").stdout == "yes\n"
    assert "hopgate" in harbour.kubectl("reader", "auth", "whoami").stdout


def test_the_clients_own_credentials_are_dropped(harbour: Harbour) -> None:
    """Whatever a client brings, the server sees the gateway's user."""
    certificate = harbour.server.client_certificate("mallory", ["system:masters"])
    foreign = {
        "token": {"token": harbour.server.tokens["developer"]},
        "certificate": {"certificate": certificate},
    }
    for name, credential in foreign.items():
        config = harbour.server.write_kubeconfig(
            harbour.bed.directory / f"{name}.kubeconfig", ca_path=harbour.gateway.ca_path, **credential
        )
        done = harbour.kubectl(
            "full",
            "--kubeconfig",
            str(config),
            "auth",
            "whoami",
            "-o",
            "jsonpath={.status.userInfo.username}",
            stdin="\n\n",
        )
        assert done.stdout.endswith("hopgate"), (name, done)
    asked = "GET /api/v1/namespaces/default/pods HTTP/1.1\r\nHost: cluster\r\n"
    size = harbour.server.audit_size()
    for header in (
        f"Authorization: Bearer {harbour.server.tokens['developer']}",
        "Authorization: Basic YTpi",
        "X-Remote-User: mallory\r\nX-Remote-Group: system:masters",
        "Cookie: session=1",
        "Proxy-Authorization: Basic YTpi",
    ):
        answered = harbour.converse_once("full", f"{asked}Connection: close\r\n{header}\r\n\r\n")
        assert answered.statuses[0] in (200, 400, 403), answered
    events = [event for event in harbour.server.audit(since=size) if event["requestURI"].endswith("/pods")]
    assert {event["user"]["username"] for event in events} == {"hopgate"}


def test_the_gateways_token_is_nowhere_to_be_read(harbour: Harbour) -> None:
    token = harbour.server.token
    said = harbour.kubectl("full", "get", "pods", "-v=9")
    assert token not in said.stdout + said.stderr
    for arguments in (["exec", POD, "--", "env"], ["get", "--raw", "/api/v1/namespaces/default/pods"]):
        done = harbour.kubectl("full", *arguments)
        assert token not in done.stdout + done.stderr
    seen = harbour.run("full", ["sh", "-c", "env; cat $KUBECONFIG"])
    assert "the-gateway-holds-it" in seen.stdout and token not in seen.stdout
    for pid in harbour.workers():
        assert token.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        assert token.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    for what, written in harbour.everything_written():
        assert token.encode() not in written, what


# --- a new policy -----------------------------------------------------------------------------------------------------


def test_a_new_policy_in_the_middle_of_a_watch(harbour: Harbour) -> None:
    """The watch ends when what it shows is not allowed any more, and the next request is judged by the new policy."""
    original = harbour.policy
    with harbour.start("reader", "get", "configmaps", "--watch") as watching:
        lines = Lines(watching)
        try:
            harbour.server.kubectl("create", "configmap", "before")
            lines.await_text("before")
            harbour.reload(original.replace("[pods, pods/log, configmaps, namespaces,", "[pods, pods/log, namespaces,"))
            harbour.server.kubectl("create", "configmap", "after")
            done = harbour.kubectl("reader", "get", "configmaps")
            assert "agent `reader` may not list configmaps" in done.stderr
            watching.wait(20)
            assert "after" not in lines.text
        finally:
            harbour.reload(original)
            harbour.server.kubectl("delete", "configmap", "before", "after", "--ignore-not-found")
    assert harbour.kubectl("reader", "get", "configmaps").returncode == 0


def test_recordings_tell_it_in_the_same_words(harbour: Harbour, configmap: str) -> None:
    mark = harbour.mark()
    harbour.kubectl(["full", "limited"], "delete", "configmap", "fruit")
    (session,) = harbour.sessions_since(mark)
    assert session.chain == "full > limited" and session.target == "cluster"
    told = harbour.gateway.cli("replay", session.id).stdout
    assert "delete configmaps/fruit in default" in told
    assert "limited-deletes-nothing" in told
    assert session.denied == 1
