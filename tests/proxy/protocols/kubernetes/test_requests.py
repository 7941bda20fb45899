"""What a request asks for: RequestInfo's cases, paths that two readers could read differently, bodies."""

from __future__ import annotations

import time

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocols.kubernetes.requests import Body, Head, Request, classify, describe
from proxy.protocols.kubernetes.scrub import scrubbed_message

JSON = (("content-type", "application/json"),)


def asked(method: str, target: str, *headers: tuple[str, str]) -> Request:
    return classify(Head(method, target, headers))


# verb, group, version, namespace, resource, subresource, name; `-` for what is empty
RESOURCES = """
GET /api/v1/namespaces -> list - v1 - namespaces - -
GET /api/v1/namespaces/other -> get - v1 other namespaces - other
PUT /api/v1/namespaces/other/status -> update - v1 other namespaces status other
PUT /api/v1/namespaces/other/finalize -> update - v1 other namespaces finalize other
GET /api/v1/namespaces/o/pods -> list - v1 o pods - -
GET /api/v1/namespaces/o/pods/foo -> get - v1 o pods - foo
HEAD /api/v1/namespaces/o/pods/foo -> get - v1 o pods - foo
GET /api/v1/pods -> list - v1 - pods - -
HEAD /api/v1/pods -> list - v1 - pods - -
POST /api/v1/namespaces/o/pods -> create - v1 o pods - -
PUT /api/v1/namespaces/o/pods/foo -> update - v1 o pods - foo
PATCH /api/v1/namespaces/o/pods/foo -> patch - v1 o pods - foo
DELETE /api/v1/namespaces/o/pods/foo -> delete - v1 o pods - foo
DELETE /api/v1/namespaces/o/pods -> deletecollection - v1 o pods - -
GET /api/v1/nodes/n1/status -> get - v1 - nodes status n1
GET /api/v1/namespaces/o/pods?watch=true -> watch - v1 o pods - -
GET /api/v1/namespaces/o/pods?watch=1 -> watch - v1 o pods - -
GET /api/v1/namespaces/o/pods?watch= -> watch - v1 o pods - -
GET /api/v1/namespaces/o/pods?watch -> watch - v1 o pods - -
GET /api/v1/namespaces/o/pods?watch=false -> list - v1 o pods - -
GET /api/v1/namespaces/o/pods?watch=0 -> list - v1 o pods - -
GET /api/v1/watch/namespaces/o/pods -> watch - v1 o pods - -
GET /api/v1/watch/pods -> watch - v1 - pods - -
GET /api/v1/watch/namespaces/o/pods/foo -> watch - v1 o pods - foo
GET /api/v1/namespaces/o/pods?fieldSelector=metadata.name%3Dfoo -> list - v1 o pods - foo
GET /api/v1/namespaces/o/pods?watch=1&fieldSelector=metadata.name=foo -> watch - v1 o pods - foo
GET /api/v1/namespaces/o/pods?fieldSelector=metadata.name!=foo -> list - v1 o pods - -
GET /apis/apps/v1/namespaces/o/deployments/web/scale -> get apps v1 o deployments scale web
GET /apis/apps/v1/deployments -> list apps v1 - deployments - -
POST /api/v1/namespaces/o/pods/foo/eviction -> create - v1 o pods eviction foo
POST /api/v1/namespaces/o/serviceaccounts/a/token -> create - v1 o serviceaccounts token a
PATCH /api/v1/namespaces/o/pods/p/ephemeralcontainers -> patch - v1 o pods ephemeralcontainers p
GET /api/v1/namespaces/o/pods/p/log?follow=true -> get - v1 o pods log p
GET /apis/rbac/v1/clusterroles/system%3Anode -> get rbac v1 - clusterroles - system:node
GET /apis/metrics.k8s.io/v1beta1/nodes -> list metrics.k8s.io v1beta1 - nodes - -
GET /api/v1/namespaces/o/pods/ -> list - v1 o pods - -
GET /api/v1/namespaces/o/pods/p/exec?command=ls -> create - v1 o pods exec p
POST /api/v1/namespaces/o/pods/p/exec?command=ls -> create - v1 o pods exec p
GET /api/v1/namespaces/o/pods/p/attach -> create - v1 o pods attach p
GET /api/v1/namespaces/o/pods/p/portforward?ports=80 -> create - v1 o pods portforward p
GET /api/v1/nodes/n/proxy/exec/ns/pod/c?command=id -> create - v1 - nodes proxy n
DELETE /api/v1/namespaces/o/services/https:web:443/proxy/a/b -> create - v1 o services proxy https:web:443
"""


@pytest.mark.parametrize("case", RESOURCES.strip().splitlines())
def test_a_resource_is_told_as_the_server_tells_it(case: str) -> None:
    method, target, _, *expected = case.split()
    request = asked(method, target)
    facts = request.facts
    assert not request.unclassified
    seen = [facts.verb, facts.group, facts.version, facts.namespace, facts.resource, facts.subresource, facts.name]
    assert [each or "-" for each in seen] == expected


PATHS = """
/ /api /apis /apis/ /api/v1 /apis/apps /apis/apps/v1 /healthz /version /metrics /openapi/v3/apis/apps/v1
/logs/kube-apiserver.log /.well-known/openid-configuration
"""


@pytest.mark.parametrize("target", PATHS.split())
def test_a_path_that_is_no_resource(target: str) -> None:
    request = asked("GET", target)
    assert (request.unclassified, request.facts.resource, request.facts.verb) == ("", "", "get")
    assert request.facts.path == request.target == target


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/api//v1/pods"),
        ("GET", "//api/v1/pods"),
        ("GET", "/api/v1/namespaces//pods"),
        ("GET", "/api/v1/namespaces/x/../y/pods"),
        ("GET", "/api/v1/namespaces/x/%2e%2e/y/pods"),
        ("GET", "/api/v1/namespaces/x/./pods"),
        ("GET", "/api/v1/namespaces/x%2Fpods"),
        ("GET", "/api/v1/namespaces/x/pods/a%2fb"),
        ("GET", "/api/v1/namespaces/x/pods/a%5Cb"),
        ("GET", "/api/v1/pods/%"),
        ("GET", "/api/v1/pods/%zz"),
        ("GET", "/api/v1/pods/%ff"),
        ("GET", "/api/v1/pods/a%00"),
        ("GET", "/api/v1/pods/a%0d%0aX: y"),
        ("GET", "/api/v1/pods#x"),
        ("GET", "/api/v1/pods?a=1;watch=1"),
        ("GET", "/api/v1/pods?watch=0&watch=1"),
        ("GET", "/api/v1/pods?watch=0&w%61tch=1"),
        ("GET", "/api/v1/pods?fieldSelector=a=b&fieldSelector=metadata.name=x"),
        ("GET", "/api/v1/namespaces/x/pods/p/status/more"),
        ("GET", "/api/v1/proxy/nodes/n"),
        ("POST", "/api/v1/watch/pods"),
        ("GET", "/api/v1/watch"),
        ("GET", "/api/v1/pods.apps"),
        ("GET", "http://other/api/v1/pods"),
        ("GET", "*"),
        ("OPTIONS", "/api/v1/pods"),
        ("CONNECT", "api:443"),
        ("TRACE", "/api/v1/pods"),
        ("GET", "/api/v1/namespaces/o/pods/p/portforward?ports=99999"),
        ("GET", "/api/v1/pods?" + "&".join(f"a{n}=1" for n in range(600))),
        ("GET", "/api/v1/pods/" + "a" * 20_000),
    ],
)
def test_what_could_be_read_in_two_ways_is_not_classified(method: str, target: str) -> None:
    request = asked(method, target)
    assert request.unclassified
    assert describe(request, Head(method, target, ()), b"").operation.unclassified == request.unclassified


def test_the_server_gets_what_was_judged() -> None:
    request = asked("GET", "/api/v1/n%61mespaces/x/pods?labelSelector=a%3Db,c+in+(d)&wat%63h=1&pretty")
    assert request.target == "/api/v1/namespaces/x/pods?labelSelector=a%3Db,c%20in%20(d)&watch=1&pretty="
    assert (request.facts.verb, request.facts.label_selector) == ("watch", "a=b,c in (d)")


@given(st.text(max_size=60), st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]))
def test_anything_is_told_or_refused_and_told_alike_again(text: str, method: str) -> None:
    target = "/api/v1/" + text.encode().decode("latin-1")
    request = asked(method, target)
    if not request.unclassified:
        again = asked(method, request.target)
        assert (again.target, again.facts, again.unclassified) == (request.target, request.facts, "")


def test_who_is_impersonated_is_part_of_it() -> None:
    headers = (
        ("impersonate-user", "system:serviceaccount:shop:web"),
        ("impersonate-group", "system:masters"),
        ("impersonate-uid", "1"),
        ("impersonate-extra-scopes%2fx", "all"),
    )
    request = asked("GET", "/api/v1/pods", *headers)
    assert [(each.target, each.namespace, each.name) for each in request.impersonated] == [
        ("serviceaccounts", "shop", "web"),
        ("groups", "", "system:masters"),
        ("uids.authentication.k8s.io", "", "1"),
        ("userextras.authentication.k8s.io/scopes/x", "", "all"),
    ]
    operation = describe(request, Head("GET", "/api/v1/pods", headers), b"").operation
    assert [each.verb for each in operation.requests] == ["list", *["impersonate"] * 4]
    assert asked("GET", "/api/v1/pods", ("impersonate-mask", "x")).unclassified
    # a header is bytes, here as Latin-1
    (named,) = asked("GET", "/api/v1/pods", ("impersonate-user", "jürgen".encode().decode("latin-1"))).impersonated
    assert named.name == "jürgen"
    assert asked("GET", "/api/v1/pods", ("impersonate-user", "j\xfcrgen")).unclassified


def test_bodies_are_sent_as_they_were_read() -> None:
    head = Head("POST", "/api/v1/namespaces/shop/pods", JSON)
    body = b'{"metadata": {"name": "a", "name": "web"}, "spec": {"big": 123456789012345678901, "x": 1.5}}'
    described = describe(classify(head), head, body)
    assert described.body == b'{"metadata":{"name":"web"},"spec":{"big":123456789012345678901,"x":1.5}}'
    assert described.operation.requests[0].name == "web"
    assert described.operation.text == "create pods/web in shop"


def test_yaml_is_sent_as_json() -> None:
    headers = (("content-type", "application/apply-patch+yaml"),)
    head = Head("PATCH", "/apis/apps/v1/namespaces/shop/deployments/web?fieldManager=x", headers)
    described = describe(classify(head), head, b"spec:\n  at: 22:22\n  on: 2020-01-01\n")
    # YAML 1.1: an unquoted `on` is no string, and a key has to be one
    assert "a key is no string" in described.operation.unclassified
    described = describe(
        classify(head), head, b"spec:\n  at: 22:22\n  since: 2020-01-01\n  yes: no\n".replace(b"yes", b"'yes'")
    )
    assert described.body == b'{"spec":{"at":"22:22","since":"2020-01-01","yes":false}}'
    assert (described.content_type, described.operation.requests[0].patch) == ("application/apply-patch+yaml", "apply")


def test_apply_says_the_same_to_a_reader_of_yaml() -> None:
    """A line's end inside a string, which YAML has more of than JSON, would become a space there."""
    head = Head("PATCH", "/api/v1/namespaces/a/configmaps/c", (("content-type", "application/apply-patch+yaml"),))
    value = {"data": {"a": "rm\x85-rf \u2028\u2029\ufeff\x7f", "b\x85": "é😀"}}
    described = describe(classify(head), head, msgspec.json.encode(value))
    assert msgspec.json.decode(described.body) == yaml.safe_load(described.body) == value
    assert "😀".encode() in described.body


@pytest.mark.parametrize(
    ("method", "media", "body"),
    [
        ("POST", "application/vnd.kubernetes.protobuf", b"k8s\0"),
        ("POST", "application/cbor", b"\xa0"),
        ("POST", "application/json", b""),
        ("POST", "application/json", b"{"),
        ("POST", "application/json", b"[]"),
        ("POST", "application/json", b"[" * 100_000),
        ("POST", "application/json", b'{"a": "\xff"}'),
        ("POST", "application/json; charset=utf-16", b"{}"),
        ("POST", "application/json-patch+json", b"[]"),
        ("PATCH", "application/json", b"{}"),
        ("PATCH", "", b"{}"),
        ("PATCH", "application/json-patch+json", b"{}"),
        ("PATCH", "application/merge-patch+json", b"[]"),
        ("PATCH", "application/apply-patch+yaml", b"a: &x 1\nb: *x"),
        ("PATCH", "application/apply-patch+cbor", b"\xa0"),
        ("PATCH", "application/json-patch+json", b"[" + b'{"op":"test","path":"/a"},' * 10_000 + b"{}]"),
    ],
)
def test_bodies_that_cannot_be_read(method: str, media: str, body: bytes) -> None:
    head = Head(method, "/api/v1/namespaces/shop/pods/p", (("content-type", media),))
    described = describe(classify(head), head, body)
    assert described.operation.unclassified
    assert described.body == b""


def test_a_compressed_body_is_not_read() -> None:
    head = Head("POST", "/api/v1/namespaces/shop/pods", (*JSON, ("content-encoding", "gzip")))
    assert "compressed" in describe(classify(head), head, b"{}").operation.unclassified


@pytest.mark.parametrize(
    ("target", "body", "dry"),
    [
        ("/api/v1/namespaces/s/pods/p?dryRun=All", b"", True),
        ("/api/v1/namespaces/s/pods/p?dryRun=All", b'{"kind":"DeleteOptions"}', False),
        ("/api/v1/namespaces/s/pods/p", b'{"dryRun":["All"]}', True),
        ("/api/v1/namespaces/s/pods/p?dryRun=None", b"", False),
        ("/api/v1/namespaces/s/pods/p?dryRun=All&dryRun=All", b"", True),
        ("/api/v1/namespaces/s/pods/p", b'{"dryRun":["All","All"]}', True),
        ("/api/v1/namespaces/s/pods/p", b'{"dryRun":[]}', False),
        ("/api/v1/namespaces/s/pods/p?dryRun=All&dryRun=Some", b"", False),
    ],
)
def test_a_deletion_is_dry_where_the_server_looks(target: str, body: bytes, dry: bool) -> None:
    head = Head("DELETE", target, JSON)
    assert describe(classify(head), head, body).operation.requests[0].dry_run is dry


@pytest.mark.parametrize("word", ["secret", "://:", "://a:", "://"])
def test_secrets_are_looked_for_in_no_time_worth_mentioning(word: str) -> None:
    head = Head("POST", "/api/v1/namespaces/s/pods/p/exec?command=" + word * (16_000 // len(word)), ())
    began = time.process_time()
    assert not describe(classify(head), head, b"").operation.unclassified
    assert time.process_time() - began < 0.15


@pytest.mark.parametrize("words", ["://:", "secret", "--token://a:", "://"])
def test_nor_in_a_body_of_megabytes(words: str) -> None:
    text = words * (2_900_000 // len(words))
    head = Head("POST", "/api/v1/namespaces/s/pods", JSON)
    for container in ({"args": [text]}, {"image": text}, {"args": [words * 4] * 100_000}):
        body = msgspec.json.encode({"spec": {"containers": [container]}})
        began = time.process_time()
        assert not describe(classify(head), head, body).operation.unclassified
        assert time.process_time() - began < 1


def test_what_is_recorded_holds_no_secret() -> None:
    head = Head("POST", "/api/v1/namespaces/shop/secrets", JSON)
    secret = {
        "metadata": {"name": "db", "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "MARK"}},
        "data": {"user": "MARK"},
        "stringData": {"x": "MARK"},
    }
    operation = describe(classify(head), head, msgspec.json.encode(secret)).operation
    assert "MARK" not in operation.recorded_text
    assert '"user":"***"' in operation.recorded_text
    pod = {
        "spec": {"containers": [{"env": [{"name": "A", "value": "MARK"}], "image": "web:1", "args": ["--x"]}]},
        "token": "MARK",
    }
    head = Head("POST", "/api/v1/namespaces/shop/pods", JSON)
    operation = describe(classify(head), head, msgspec.json.encode(pod)).operation
    assert "MARK" not in operation.recorded_text
    assert "web:1" in operation.recorded_text
    patch = [{"op": "replace", "path": "/data/user", "value": "MARK"}]
    head = Head("PATCH", "/api/v1/namespaces/shop/secrets/db", (("content-type", "application/json-patch+json"),))
    operation = describe(classify(head), head, msgspec.json.encode(patch)).operation
    assert "MARK" not in operation.recorded_text
    head = Head(
        "GET", "/api/v1/namespaces/s/pods/p/exec?command=psql&command=postgres://u:MARK@h/d&command=--password=MARK", ()
    )
    request = classify(head)
    operation = describe(request, head, b"").operation
    assert "MARK" not in operation.recorded_text
    assert request.facts.command == ("psql", "postgres://u:MARK@h/d", "--password=MARK")


def test_what_is_asked_again_is_one_operation_and_of_what_is_asked_once_nothing_is_kept() -> None:
    head = Head("GET", "/api/v1/namespaces/shop/pods/asked-again", ())
    first, second, third = (describe(classify(head), head, b"").operation for _ in range(3))
    assert first.once and first is not second
    assert second is third and not second.once and second.requests == first.requests
    other = Head("GET", "/api/v1/namespaces/shop/pods/asked-again", (("impersonate-user", "ada"),))
    assert describe(classify(other), other, b"").operation.requests != first.requests
    gone = Head("DELETE", "/api/v1/namespaces/shop/pods/asked-again", ())
    assert all(describe(classify(gone), gone, body).operation.once for body in (b"", b"", b"{}", b"{}"))


def test_words_of_commands_in_a_body_are_recorded_as_those_of_an_exec() -> None:
    container = {
        "image": "token-service:1.2",
        "args": ["--password=MARK", "--token", "MARK", "--verbose", "--dsn=postgres://u:MARK@h/d"],
        "command": ["psql", "postgres://u:MARK@h/d"],
        "livenessProbe": {"exec": {"command": ["curl", "https://u:MARK@h"]}},
    }
    body = {"metadata": {"annotations": {"dsn": "postgres://u:MARK@h/d"}}, "spec": {"containers": [container]}}
    head = Head("POST", "/api/v1/namespaces/shop/pods", JSON)
    operation = describe(classify(head), head, msgspec.json.encode(body)).operation
    assert "MARK" not in operation.recorded_text
    assert '"token-service:1.2"' in operation.recorded_text and '"--verbose"' in operation.recorded_text
    head = Head("PATCH", "/api/v1/namespaces/shop/pods/p", (("content-type", "application/json-patch+json"),))
    for path, value in (
        ("/spec/containers/0/args/0", "--password=MARK"),
        ("/spec/containers/0/args", ["--token=MARK"]),
    ):
        patch = [{"op": "add", "path": path, "value": value}]
        operation = describe(classify(head), head, msgspec.json.encode(patch)).operation
        assert "MARK" not in operation.recorded_text and path in operation.recorded_text


def test_a_patch_of_a_whole_secret_is_recorded_without_its_values() -> None:
    head = Head("PATCH", "/api/v1/namespaces/shop/secrets/db", (("content-type", "application/json-patch+json"),))
    for path in ("", "/", "/data", "/stringData/user", "/data/args"):
        patch = [{"op": "replace", "path": path, "value": {"kind": "Secret", "data": {"user": "MARK"}}}]
        operation = describe(classify(head), head, msgspec.json.encode(patch)).operation
        assert "MARK" not in operation.recorded_text and "replace" in operation.recorded_text


@pytest.mark.parametrize(
    ("resource", "message", "kept"),
    [
        ("secrets", 'secrets "db" not found', 'secrets "db" not found'),
        ("secrets", '"" is invalid: patch: Invalid value: "{\\"data\\":{\\"a\\":\\"MARK\\"}}": no', ""),
        ("secrets", "illegal base64 in MARK", ""),
        ("pods", 'patch: Invalid value: "{\\"env\\":\\"MARK\\"}": no', "patch: Invalid value: ***: no"),
        ("pods", 'patch: Invalid value: "{\\"env\\":\\"MA', "patch: Invalid value: ***"),
        ("pods", "patch: Invalid value: map[env: MARK]: no", "patch: Invalid value: ***"),
        ("pods", 'a: Invalid value: {"x":"MARK"}: no', "a: Invalid value: ***"),
        ("pods", "[a: Invalid value: 5: no, b: Required value]", "[a: Invalid value: ***: no, b: Required value]"),
        ("pods", 'a: Unsupported value: "MARK": supported: "b"', 'a: Unsupported value: ***: supported: "b"'),
        (
            "pods",
            "expect {, but found 5, error found in #10 byte of ...|MARK",
            "expect {, but found 5, error found in #***",
        ),
        ("pods", "the url is https://user:MARK@host", "the url is https://user:***@host"),
    ],
)
def test_what_a_server_quotes_is_not_recorded(resource: str, message: str, kept: str) -> None:
    assert scrubbed_message(resource, message) == kept


@pytest.mark.parametrize(
    ("method", "target", "told"),
    [
        ("POST", "/api/v1/nodes/n/proxy/run/s/p/c?cmd=id", "create nodes/n proxy: POST {}"),
        ("GET", "/api/v1/namespaces/proxy/pods/p/proxy/", "create pods/p proxy in proxy: GET {}"),
        (
            "POST",
            "/api/v1/namespaces/s/pods/p/exec?command=id&container=c",
            "create pods/p exec in s: id (in container c)",
        ),
        ("POST", "/api/v1/namespaces/s/pods/p/attach?container=c", "create pods/p attach in s (in container c)"),
        ("POST", "/api/v1/namespaces/s/pods/p/attach?container=", "create pods/p attach in s"),
    ],
)
def test_what_is_run_is_recorded_with_where_it_is(method: str, target: str, told: str) -> None:
    operation = describe(asked(method, target), Head(method, target, ()), b"").operation
    assert operation.recorded_text == told.format(target)


def test_a_command_of_several_lines_is_told_in_one() -> None:
    request = asked("POST", "/api/v1/namespaces/s/pods/p/exec?command=sh&command=-c&command=a%0A%09b%0D%0Ac")
    assert request.facts.command == ("sh", "-c", "a\n\tb\r\nc")
    operation = describe(request, Head("POST", request.target, ()), b"").operation
    assert operation.text == "create pods/p exec in s: sh -c a\\n\\tb\\r\\nc" == operation.recorded_text
    assert "%0A" in request.target
    for other in ("%00", "%1B", "%7F"):
        assert asked("POST", f"/api/v1/namespaces/s/pods/p/exec?command=a{other}").unclassified
    assert asked("POST", "/api/v1/namespaces/s/pods/p/exec?container=a%0A").unclassified


def test_what_is_done_with_bodies() -> None:
    assert asked("GET", "/api/v1/pods").body is Body.NONE
    assert asked("POST", "/api/v1/namespaces/s/pods").body is Body.JUDGED
    assert asked("DELETE", "/api/v1/namespaces/s/pods/p").body is Body.JUDGED
    assert asked("POST", "/api/v1/namespaces/s/pods/p/exec?command=ls").body is Body.NONE
    assert asked("POST", "/api/v1/namespaces/s/services/w/proxy/upload").body is Body.STREAMED
