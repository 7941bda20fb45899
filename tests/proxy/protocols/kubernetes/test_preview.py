"""What a human sees of a request that is held: the dry run, in order, without secrets; and that nothing but reading and
dry runs reaches the server before the ruling."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.model import FieldMask
from proxy.protocols.base import AskCredential, AskRuling, Connect, Credential, Disconnect, Refusal
from proxy.protocols.kubernetes.preview import MAX_OBJECT, MAX_TEXT
from tests.proxy.protocols.kubernetes.playing import (
    ALLOW,
    APPROVED,
    DENY,
    HIDE,
    REDACT,
    TOKEN,
    C,
    Player,
    S,
    login,
    request,
    response,
)

WEB = "/apis/apps/v1/namespaces/shop/deployments/web"


def deployment(replicas: int, **metadata: Any) -> dict[str, Any]:
    return {
        "kind": "Deployment",
        "apiVersion": "apps/v1",
        "metadata": {
            "name": "web",
            "uid": "u",
            "resourceVersion": str(replicas),
            "managedFields": [{"a": 1}],
            **metadata,
        },
        "spec": {"replicas": replicas, "paused": False},
    }


def answer(value: object, status: str = "200 OK") -> bytes:
    return response(json.dumps(value).encode(), status)


def held(player: Player) -> AskRuling:
    """The last question, about which a human is now asked."""
    ask = player.of(AskRuling)[-1]
    player.carry_out(player.machine.preview(ask))
    return ask


def waiting(raw: bytes, masks: tuple[FieldMask, ...] = ()) -> tuple[Player, AskRuling]:
    player = Player(lambda operation: None, login=login(masks))
    player.client(raw)
    return player, held(player)


PATCH = request("PATCH", WEB, b'{"spec":{"replicas":0}}', content_type="application/merge-patch+json")


def test_a_patch_is_shown_as_the_difference_that_it_would_make() -> None:
    player, ask = waiting(PATCH)
    player.server(answer(deployment(3)))
    assert not player.previews
    player.server(answer(deployment(0)))
    (text,) = player.previews
    assert text == (f"{ask.operation.recorded_text}\n spec:\n   paused: false\n-  replicas: 3\n+  replicas: 0")
    get, dry = player.requests()
    assert (get.method, get.target) == ("GET", WEB)
    assert (dry.method, dry.target, dry.body) == ("PATCH", WEB + "?dryRun=All", b'{"spec":{"replicas":0}}')
    assert dry.header("content-type") == "application/merge-patch+json"
    assert {sent.header("authorization") for sent in (get, dry)} == {f"Bearer {TOKEN}"}
    assert not player.sent[C] and not player.done

    player.reply(ask, APPROVED)
    assert player.requests()[2].target == WEB
    player.server(answer(deployment(0)))
    (told,) = player.answers()
    assert told.status == 200 and "approved by ada" in (told.header("warning") or "")
    assert len(player.done) == 1 and player.closed is None


def test_a_denial_after_the_preview_lets_nothing_else_reach_the_server() -> None:
    player, ask = waiting(PATCH)
    player.server(answer(deployment(3))).server(answer(deployment(0)))
    player.reply(ask, DENY)
    assert len(player.requests()) == 2 and player.answers()[0].status == 403 and player.closed is None
    player.client(request())
    player.reply(player.of(AskRuling)[-1], ALLOW).server(response())
    assert [told.status for told in player.answers()] == [403, 200]


@pytest.mark.parametrize(
    "body",
    [b"", b'{"propagationPolicy":"Background"}', b'{"kind":"DeleteOptions","dryRun":[]}'],
    ids=["none", "options", "no dry run"],
)
def test_a_delete_is_tried_with_dry_run_in_its_body_where_the_server_looks(body: bytes) -> None:
    player, _ = waiting(request("DELETE", WEB + "?dryRun=", body or None))
    player.server(answer(deployment(3)))
    dry = player.requests()[1]
    assert dry.method == "DELETE" and dry.json["dryRun"] == ["All"] and dry.target == WEB + "?dryRun=All"
    assert dry.json.get("propagationPolicy") == (json.loads(body or b"{}").get("propagationPolicy"))
    player.server(answer({"kind": "Status", "status": "Success"}))
    assert "-  replicas: 3" in player.previews[0] and "\n+" not in player.previews[0]


def test_an_eviction_is_shown_as_the_end_of_its_pod() -> None:
    body = b'{"kind":"Eviction","metadata":{"name":"web"},"deleteOptions":{"gracePeriodSeconds":0}}'
    player, _ = waiting(request("POST", "/api/v1/namespaces/shop/pods/web/eviction", body))
    player.server(answer({"kind": "Pod", "metadata": {"name": "web"}, "spec": {"nodeName": "n"}}))
    player.server(answer({"kind": "Status", "status": "Success"}))
    get, dry = player.requests()
    assert (get.method, get.target) == ("GET", "/api/v1/namespaces/shop/pods/web")
    assert (dry.method, dry.target) == ("POST", "/api/v1/namespaces/shop/pods/web/eviction?dryRun=All")
    assert json.loads(dry.body)["deleteOptions"] == {"gracePeriodSeconds": 0, "dryRun": ["All"]}
    (text,) = player.previews
    assert "\n-  nodeName: n" in text and "+" not in text


def test_of_what_is_deleted_at_once_the_names_are_shown() -> None:
    player, _ = waiting(request("DELETE", "/api/v1/secrets?labelSelector=a%3Db", b""), (REDACT,))
    items = [{"metadata": {"name": f"s{n}", "namespace": "shop"}, "data": {"a": "bWFya2Vy"}} for n in range(60)]
    player.server(answer({"kind": "SecretList", "apiVersion": "v1", "metadata": {}, "items": items}))
    (dry,) = player.requests()
    assert (dry.method, dry.target) == ("DELETE", "/api/v1/secrets?labelSelector=a%3Db&dryRun=All")
    assert json.loads(dry.body)["dryRun"] == ["All"]
    (text,) = player.previews
    assert "(it would delete 60)\n-s0 in shop\n" in text and text.endswith("-s49 in shop\n… and 10 more")
    assert "bWFya2Vy" not in text


def test_every_request_before_the_ruling_is_a_get_or_a_dry_run() -> None:
    for raw in (
        PATCH,
        request("PUT", WEB + "?fieldManager=x", json.dumps(deployment(1)).encode()),
        request("POST", "/api/v1/namespaces/shop/pods?dryRun=&dryRun=", b'{"kind":"Pod"}'),
        request("DELETE", WEB, b"{}"),
        request("PATCH", WEB + "/scale", b"{}", content_type="application/merge-patch+json"),
    ):
        player, _ = waiting(raw)
        for _ in range(3):
            if not player.previews:
                player.server(answer(deployment(1)))
        sent = player.requests()
        assert player.previews and sent
        for each in sent:
            assert each.method == "GET" or each.target.endswith("dryRun=All")
            assert each.target.count("dryRun") <= 1
            if each.method == "DELETE":
                assert each.json["dryRun"] == ["All"]


@pytest.mark.parametrize(
    "raw",
    [
        request("GET", WEB),
        request("POST", "/api/v1/namespaces/shop/serviceaccounts/a/token", b'{"kind":"TokenRequest"}'),
        request("POST", "/api/v1/namespaces/shop/pods/web/exec?command=id"),
        request("POST", "/api/v1/namespaces/shop/bindings", b'{"kind":"Binding"}'),
        request("PATCH", "/apis/example.com/v1/widgets/a", b"{}", content_type="application/merge-patch+json"),
        request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", b'{"kind":"x"}'),
        request("POST", "/api/v1/namespaces/shop/pods/web/proxy/x", b"{}"),
        request("POST", "/api/v1/namespaces/shop/pods?dryRun=All", b'{"kind":"Pod"}'),
    ],
)
def test_a_server_that_might_do_it_in_earnest_is_not_asked(raw: bytes) -> None:
    player, ask = waiting(raw)
    assert player.previews == [ask.operation.recorded_text] and not player.sent[S]


def test_values_of_secrets_are_not_shown_but_that_they_change_is() -> None:
    path = "/api/v1/namespaces/shop/secrets/s"
    for masks in ((), (REDACT,)):
        secret = {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "s"}}
        player, _ = waiting(
            request("PATCH", path, b'{"data":{"p":"bmV3"}}', content_type="application/merge-patch+json"), masks
        )
        player.server(answer({**secret, "data": {"p": "b2xk", "q": "c2FtZQ=="}}))
        player.server(answer({**secret, "data": {"p": "bmV3", "q": "c2FtZQ=="}}))
        (text,) = player.previews
        assert "(changed)" in text and text.count("(changed)") == 1
        for value in ("b2xk", "bmV3", "c2FtZQ"):
            assert value not in text


def test_masked_fields_are_masked_in_what_is_shown() -> None:
    mask = FieldMask(
        "deployments.apps", (), (), "spec.template.spec.containers[*].image", "redact", lambda value: b"***"
    )

    def with_image(image: str) -> dict[str, Any]:
        return {**deployment(1), "spec": {"template": {"spec": {"containers": [{"name": "a", "image": image}]}}}}

    player, _ = waiting(PATCH, (mask,))
    player.server(answer(with_image("internal/one"))).server(answer(with_image("internal/two")))
    (text,) = player.previews
    assert "internal" not in text and "image: *** (changed)" in text


def test_what_is_hidden_is_not_asked_for() -> None:
    player, ask = waiting(request("DELETE", "/api/v1/namespaces/shop/pods/hidden-1", b"{}"), (HIDE,))
    assert "will not be found" in player.previews[0] and not player.sent[S]
    player.reply(ask, APPROVED)
    assert player.answers()[0].status == 404 and not player.sent[S]


def test_the_servers_refusal_is_shown() -> None:
    player, _ = waiting(PATCH)
    player.server(answer(deployment(3)))
    player.server(
        answer({"kind": "Status", "message": "spec.replicas: must be greater than 0"}, "422 Unprocessable Entity")
    )
    assert (
        "(the server would refuse it: 422 Unprocessable Entity: spec.replicas: must be greater than 0)"
        in player.previews[0]
    )


def test_a_refusal_of_a_secret_is_shown_without_its_words() -> None:
    player, _ = waiting(
        request("PATCH", "/api/v1/namespaces/shop/secrets/s", b"{}", content_type="application/merge-patch+json")
    )
    player.server(answer({"kind": "Secret"}))
    player.server(answer({"kind": "Status", "message": 'Invalid value: "hunter2"'}, "422 Unprocessable Entity"))
    assert "422" in player.previews[0] and "hunter2" not in player.previews[0]


def test_what_is_not_there_yet_is_shown_as_new() -> None:
    player, _ = waiting(PATCH)
    player.server(answer({"kind": "Status", "message": "not found"}, "404 Not Found")).server(answer(deployment(2)))
    assert "+  replicas: 2" in player.previews[0]


def test_nothing_to_change_is_said() -> None:
    player, _ = waiting(PATCH)
    player.server(answer(deployment(3))).server(answer(deployment(3, generation=9, resourceVersion="11")))
    assert "(nothing would change)" in player.previews[0]


def test_what_is_shown_is_bounded_and_plain() -> None:
    player, _ = waiting(PATCH)
    player.server(answer(deployment(3)))
    player.server(answer(deployment(0, annotations={f"k{n}": "\x1b[2J‮" + "x" * 100 for n in range(300)})))
    (text,) = player.previews
    assert len(text) <= MAX_TEXT and "\x1b" not in text and "‮" not in text
    player, _ = waiting(PATCH)
    player.server(answer(deployment(3, labels={str(n): "a" for n in range(5000)})))
    player.server(answer(deployment(3, labels={str(n): "b" for n in range(5000)})))
    assert "too many to be compared" in player.previews[0]


def test_an_answer_that_is_too_large_is_skipped() -> None:
    player, ask = waiting(PATCH)
    body = b"x" * (MAX_OBJECT + 10)
    player.server(response(body))
    assert "too large" in player.previews[0] and len(player.requests()) == 1
    player.reply(ask, ALLOW)
    player.server(response(b"[1]"))
    assert player.answers()[0].body == b"[1]"


@pytest.mark.parametrize("what", [b"no json", b"\xff\xfe", b"[" * 100_000])
def test_an_answer_that_is_not_understood_is_said_to_be(what: bytes) -> None:
    player, _ = waiting(PATCH)
    player.server(response(what))
    assert player.previews


def test_a_ruling_in_the_middle_of_a_dry_run_waits_for_its_answer() -> None:
    for ruling, status in ((APPROVED, 200), (DENY, 403)):
        player, ask = waiting(PATCH)
        player.server(answer(deployment(3))[:-5])
        player.reply(ask, ruling)
        assert len(player.requests()) == 1 and not player.sent[C] and not player.previews
        player.server(answer(deployment(3))[-5:])
        assert not player.previews
        assert [sent.target for sent in player.requests()] == ([WEB, WEB] if status == 200 else [WEB])
        if status == 200:
            player.server(answer({"final": True}))
            assert player.answers()[0].json == {"final": True}
        assert player.answers()[0].status == status and player.closed is None


def test_a_ruling_before_the_credential_of_a_dry_run_spares_the_question() -> None:
    player = Player(lambda operation: None, token=None).client(PATCH)
    ask = held(player)
    player.reply(ask, APPROVED)
    assert not player.sent[S]
    player.reply(player.of(AskCredential)[0], Credential(TOKEN))
    assert len(player.of(AskCredential)) == 2 and not player.sent[S]
    player.reply(player.of(AskCredential)[1], Credential(TOKEN))
    (sent,) = player.requests()
    assert sent.target == WEB


def test_without_a_credential_there_is_no_dry_run() -> None:
    player = Player(lambda operation: None, token=Refusal("no credential", "tell the operators")).client(PATCH)
    held(player)
    assert "no credential" in player.previews[0] and not player.sent[S]


def test_questions_carry_whom_the_request_acts_as_and_nothing_else_of_the_client() -> None:
    raw = request(
        "PATCH",
        WEB,
        b"{}",
        "Impersonate-User: ada",
        "Authorization: Bearer client",
        "Accept: application/json;as=Table",
        "If-None-Match: x",
        "User-Agent: kubectl",
        content_type="application/merge-patch+json",
    )
    player, _ = waiting(raw)
    assert sorted(name for name, _ in player.requests()[0].headers) == [
        "accept",
        "accept-encoding",
        "authorization",
        "host",
        "impersonate-user",
        "user-agent",
    ]


def test_a_server_that_leaves_while_a_human_decides_is_connected_to_again() -> None:
    player, ask = waiting(PATCH)
    player.carry_out(player.machine.eof(S))
    assert "closed the connection" in player.previews[0]
    assert player.said.count(Connect()) == 1 and not player.closed
    player.sent[S].clear()
    player.reply(ask, APPROVED)
    assert player.said.count(Connect()) == 2
    assert (
        player.sent[S].startswith(b"PATCH ")
        and player.sent[S].count(b"Bearer") == 1
        and b"dryRun" not in player.sent[S]
    )
    (told,) = player.server(response()).answers()
    assert told.status == 200 and not player.closed and player.done


def test_a_server_that_cannot_be_reached_again_is_told() -> None:
    player, ask = waiting(PATCH)
    player.carry_out(player.machine.eof(S))
    player.unreachable = "target `cluster` is not reachable"
    player.reply(ask, APPROVED)
    (told,) = player.answers()
    assert told.status == 503 and "not reachable" in told.json["message"] and player.closed


def test_a_server_that_wants_to_close_after_the_dry_run_is_connected_to_again() -> None:
    player, ask = waiting(PATCH)
    player.server(response(b"{}", "200 OK", "Connection: close"))
    assert "closed the connection" in player.previews[0]
    player.sent[S].clear()
    player.reply(ask, APPROVED)
    assert player.said[-4:-1].count(Disconnect()) == 1 and player.sent[S].startswith(b"PATCH ")
    (told,) = player.server(response()).answers()
    assert told.status == 200 and not player.closed and player.done
