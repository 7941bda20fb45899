"""Policy files: what is written is what is loaded, and everything that is wrong is said with file and line, at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.model import Endpoint, TlsMode
from proxy.policy import Agent, Document, PolicyError, load, resolve
from proxy.policy.document import Mask, ObjectMask, Requests, Where

CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"

GOOD = """
agents:
  A: {exe: /usr/bin/python3.11, argv: "*migrate.py*", uid: 1001, cgroup: "/ci/*", sha256: "%s"}
  B: {exe: /bin/sh}
targets:
  orders:
    protocol: postgresql
    addresses: ["203.0.113.10", "[2001:db8::1]:6432", "::ffff:203.0.113.11", DB.example]
    tls: {mode: verify-ca, ca: ca.pem}
    credential: orders-credential
    databases: [shop]
rules:
  - name: read
    agents: [A, B, unattributed]
    targets: "*"
    statements: [read, drop-*]
    relations: [public.customers, 'public."odd.name"', "s.*"]
    functions: [my_fn]
    decision: hold
    timeout: 5m
    hint: |
      ask
      in #dba
  - name: mask
    agents: "*"
    targets: orders
    masks: [{column: public.customers.email, method: partial}]
protect: {6432: postgresql}
""" % ("AB" * 32)


def written(folder: Path, **files: str) -> Path:
    (folder / "ca.pem").write_text(CERTIFICATE)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(PolicyError) as raised:
        load(written(folder, p=text))
    return [problem.removeprefix(f"{folder}/") for problem in raised.value.problems]


def names(_: str) -> list[str]:
    return ["203.0.113.20", "2001:DB8:0::2"]


def test_what_is_written_is_what_is_loaded(tmp_path: Path) -> None:
    document = load(written(tmp_path, a=GOOD))
    assert document.agents == (
        Agent("A", "/usr/bin/python3.11", "ab" * 32, "*migrate.py*", 1001, "/ci/*"),
        Agent("B", "/bin/sh"),
    )
    read, mask = document.rules
    assert read.agents == ("A", "B", "unattributed")
    assert (read.decision, read.timeout_s, read.hint) == ("hold", 300.0, "ask in #dba")
    assert read.relations == ("public.customers", 'public."odd.name"', "s.*")
    assert (mask.decision, mask.masks) == (None, (Mask("public", "customers", "email", "partial"),))
    assert document.protected_ports == {5432: "postgresql", 6432: "postgresql", 6443: "kubernetes"}


def test_addresses_are_resolved_and_canonical(tmp_path: Path) -> None:
    (target,) = resolve(load(written(tmp_path, a=GOOD)), names).targets
    assert target.endpoints == (
        Endpoint("2001:db8::1", 6432),
        Endpoint("2001:db8::2", 5432),
        Endpoint("203.0.113.10", 5432),
        Endpoint("203.0.113.11", 5432),
        Endpoint("203.0.113.20", 5432),
    )
    assert (target.server_name, target.tls_mode, target.ca_pem) == ("db.example", TlsMode.VERIFY_CA, CERTIFICATE)
    assert (target.credential, target.databases) == ("orders-credential", ("shop",))


def test_the_version_is_of_the_content_and_not_of_its_order(tmp_path: Path) -> None:
    head, rules = GOOD.split("rules:\n")
    second = rules.index("  - name: mask")
    end = rules.index("protect:")
    swapped = f"{rules[end:]}rules:\n{rules[second:end]}{rules[:second]}{head}"
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
    one = resolve(load(written(tmp_path / "one", a=GOOD)), names)
    two = resolve(load(written(tmp_path / "two", z=head, b=f"rules:\n{rules}")), names)
    three = resolve(load(written(tmp_path / "three", a=swapped)), names)
    assert len(one.version) == 12
    assert one == two == three
    other = resolve(load(written(tmp_path / "three", a=swapped.replace("partial", "redact"))), names)
    assert other.version != one.version


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("agents: [\n", "p.yaml:2: not YAML"),
        ("agents:\n\tA: {}", "p.yaml:2: not YAML"),
        ("agents: {}\n---\nrules: []", "p.yaml:3: a second document"),
        ("- a", "p.yaml:1: `the file` wants `key: value` lines"),
        ("agents: {}\nagnets: {}", "p.yaml:2: unknown key `agnets`: known are `agents`, `protect`, `rules`, `targets`"),
        ("agents: {}\nagents: {}", "p.yaml:2: key `agents` is given twice (first at line 1)"),
        ("<<: {agents: {}}", "p.yaml:1: unknown key `<<`"),
        ("agents:\n  A:\n    exe: /a\n    ex: /b", "p.yaml:4: unknown key `ex`"),
        ("agents:\n  A:\n    uid: 1", "p.yaml:2: agent `A` needs `exe`, or `declared_by`"),
        ("agents:\n  A: {declared_by: X}", "p.yaml:2: `X` is neither uid:N nor another agent"),
        ("agents:\n  A: {declared_by: A}", "p.yaml:2: `A` is neither uid:N nor another agent"),
        ("agents:\n  A: {declared_by: unattributed}", "p.yaml:2: `unattributed` is neither uid:N nor another agent"),
        ("agents:\n  A: {declared_by: 'uid:x'}", "p.yaml:2: `uid:x` is neither uid:N nor another agent"),
        ("agents:\n  A: {declared_by: 'uid:0', argv: x}", "p.yaml:2: `argv` without `exe`"),
        ("agents:\n  A: {exe: 1}", "p.yaml:2: `exe` wants text, `1` is a number: put it in quotes"),
        ("agents:\n  A: {exe: /a, uid: x}", "p.yaml:2: `uid` wants a number, `x` is text"),
        ("agents:\n  A: {exe: /a, uid: -1}", "p.yaml:2: `-1` is not a uid"),
        ("agents:\n  A: {exe: /a, uid: yes}", "p.yaml:2: `uid` wants a number, `yes` is a boolean"),
        ("agents:\n  A: {exe: a}", "p.yaml:2: `a` is not an absolute path"),
        ("agents:\n  A: {exe: /a, sha256: abc}", "p.yaml:2: `abc` is not 64 hex digits"),
        ("agents:\n  A: {exe: /a,\n  argv: '*[a'}", "p.yaml:3: bad glob `*[a`"),
        ("agents:\n  unattributed: {exe: /a}", "p.yaml:2: `unattributed` cannot be a name"),
        ("agents:\n  '*': {exe: /a}", "p.yaml:2: `*` cannot be a name"),
        ("agents: {A: [x]}", "p.yaml:1: `A` wants `key: value` lines"),
        ("protect: {0: postgresql}", "p.yaml:1: `0` is not a port"),
        ("protect: {5432: mysql}", "p.yaml:1: `5432` cannot be `mysql`: wants `kubernetes`, `postgresql`"),
    ],
)
def test_a_mistake_is_said_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.startswith(said)


TARGET = "targets:\n  t:\n    protocol: postgresql\n    addresses: %s\n    credential: c\n    tls: %s\n"


@pytest.mark.parametrize(
    ("addresses", "tls", "said"),
    [
        ("a:b:c", "{}", "p.yaml:4: `a:b:c` is not an address"),
        ("['1.2.3.4:0']", "{}", "p.yaml:4: `0` in `1.2.3.4:0` is not a port"),
        ("['1.2.3.4:70000']", "{}", "p.yaml:4: `70000` in `1.2.3.4:70000` is not a port"),
        ("['1.2.3.400']", "{}", "p.yaml:4: `1.2.3.400` is not an address"),
        ("['[::1']", "{}", "p.yaml:4: `[::1` is not an address"),
        ("['-x']", "{}", "p.yaml:4: `-x` is not an address"),
        ("[]", "{}", "p.yaml:4: a target needs at least one address"),
        ("a", "{mode: full}", "p.yaml:6: `mode` cannot be `full`"),
        ("a", "{ca: missing.pem}", "p.yaml:6: CA file `{tmp}/missing.pem` cannot be read: No such file or directory"),
        ("a", "{ca: p.yaml}", "p.yaml:6: CA file `{tmp}/p.yaml` holds no PEM certificate"),
        ("a", "{ca: key.pem}", "p.yaml:6: CA file `{tmp}/key.pem` holds a private key"),
        ("a", "{ca: ca.pem, mode: disable}", "p.yaml:6: a CA without TLS"),
    ],
)
def test_a_target_is_checked(tmp_path: Path, addresses: str, tls: str, said: str) -> None:
    (tmp_path / "key.pem").write_text(CERTIFICATE + "-----BEGIN PRIVATE KEY-----\n")
    (problem,) = problems(tmp_path, TARGET % (addresses, tls))
    assert problem.startswith(said.replace("{tmp}", str(tmp_path)))


RULE = TARGET % ("a", "{}") + "agents: {A: {exe: /a}}\nrules:\n  - name: r\n    agents: A\n    targets: t\n"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("    decision: maybe\n    statements: select", "p.yaml:12: `decision` cannot be `maybe`"),
        ("    decision: allow", "p.yaml:12: rule `r` decides on no `statements`"),
        ("    statements: select", "p.yaml:9: rule `r` has no `decision`"),
        ("    hint: x", "p.yaml:9: rule `r` has no `decision`"),
        (
            "    decision: allow\n    statements: [select, selct]",
            "p.yaml:13: unknown statement kind `selct`",
        ),
        ("    decision: allow\n    statements: x-*", "p.yaml:13: unknown statement kind `x-*`"),
        (
            "    decision: allow\n    statements: select\n    relations: customers",
            "p.yaml:14: `customers` is not `schem",
        ),
        (
            "    decision: allow\n    statements: select\n    relations: 'a.b.c'",
            "p.yaml:14: `a.b.c` is not `sch",
        ),
        ("    decision: allow\n    statements: select\n    relations: 'a.\"b'", 'p.yaml:14: `a."b` is not a name'),
        ("    decision: allow\n    statements: select\n    functions: a.b.c", "p.yaml:14: `a.b.c` is not `function`"),
        ("    decision: allow\n    statements: select\n    timeout: 5s", "p.yaml:14: `timeout` is for `hold`"),
        ("    decision: hold\n    statements: select\n    timeout: 5", "p.yaml:14: `timeout` wants text"),
        ("    decision: hold\n    statements: select\n    timeout: soon", "p.yaml:14: `timeout` cannot be `soon`"),
        ("    decision: hold\n    statements: select\n    timeout: 25h", "p.yaml:14: `25h` is not between 1s and 24h"),
        ("    masks: [{column: email, method: redact}]", "p.yaml:12: `email` is not `schema.relation.column`"),
        ("    masks: [{column: 'a.*.c', method: redact}]", "p.yaml:12: `a.*.c` has a star"),
        ("    masks: [{column: a.b.c, method: rot13}]", "p.yaml:12: `method` cannot be `rot13`"),
        ("    masks: [{column: pg_catalog.b.c, method: hash}]", "p.yaml:12: `pg_catalog.b.c`: columns of the catalog"),
        (
            "    masks:\n      - {column: a.b.c, method: hash}\n      - {column: a.b.c, method: redact}",
            "p.yaml:14: `a.b.c` is masked twice",
        ),
    ],
)
def test_a_rule_is_checked(tmp_path: Path, rule: str, said: str) -> None:
    (problem,) = problems(tmp_path, RULE + rule)
    assert problem.startswith(said)


def test_a_rule_may_name_only_agents_and_targets_that_there_are(tmp_path: Path) -> None:
    text = RULE.replace("agents: A\n", "agents: [A, X]\n").replace("targets: t\n", "targets: [t, y]\n")
    assert problems(tmp_path, text + "    decision: allow\n    statements: select") == [
        "p.yaml:10: unknown agent `X` in rule `r`: known are `A`, `unattributed`",
        "p.yaml:11: unknown target `y` in rule `r`: known are `t`",
    ]


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    text = "agents:\n  A: {exe: a, uid: -1}\nrules: [{name: r, agents: A, targets: x, statements: y, decision: deny}]"
    assert len(problems(tmp_path, text)) == 4


def test_names_are_unique_over_all_files(tmp_path: Path) -> None:
    rule = "rules:\n  - {name: r, agents: '*', targets: '*', statements: select, decision: deny}\n"
    agent = "agents:\n  A: {exe: /a}\n"
    with pytest.raises(PolicyError) as raised:
        load(written(tmp_path, a=agent + rule, b=rule + agent))
    assert raised.value.problems == (
        f"{tmp_path}/b.yaml:4: `A` in `agents` is defined twice (first at {tmp_path}/a.yaml:2)",
        f"{tmp_path}/b.yaml:2: rule `r` is defined twice (first at {tmp_path}/a.yaml:4)",
    )


def test_a_broken_file_does_not_make_others_look_wrong(tmp_path: Path) -> None:
    rule = "rules:\n  - {name: r, agents: A, targets: t, statements: select, decision: deny}\n"
    with pytest.raises(PolicyError) as raised:
        load(written(tmp_path, a="agents: {A: {exe: /a}}\ntargets: [", b=rule))
    assert len(raised.value.problems) == 1


def test_no_directory_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no such directory"):
        load(tmp_path / "missing")
    assert load(tmp_path) == Document((), (), (), {5432: "postgresql", 6443: "kubernetes"}, ())


def test_a_name_that_does_not_resolve_is_said_with_its_place(tmp_path: Path) -> None:
    def refuse(name: str) -> list[str]:
        raise OSError(f"no {name}")

    with pytest.raises(PolicyError) as raised:
        resolve(load(written(tmp_path, a=GOOD)), refuse)
    assert str(raised.value) == f"{tmp_path}/a.yaml:8: host name `db.example` does not resolve: no db.example"


def test_two_targets_cannot_share_an_address(tmp_path: Path) -> None:
    again = GOOD.split("rules:")[0].split("targets:")[1].replace("orders:", "other:")
    with pytest.raises(PolicyError, match="`other` is also an address of target `orders`"):
        resolve(load(written(tmp_path, a=GOOD, b=f"targets:{again}")), names)


# --- Kubernetes -------------------------------------------------------------------------------------------------------

CLUSTER = """agents: {A: {exe: /a}}
targets:
  k: {protocol: kubernetes, addresses: a, credential: c}
  p: {protocol: postgresql, addresses: b, credential: c}
rules:
  - name: r
    agents: A
    targets: k
"""

PODS = "    decision: allow\n    verbs: [create]\n    resources: pods\n"


def test_a_rule_on_requests_is_loaded_as_it_is_written(tmp_path: Path) -> None:
    text = CLUSTER + (
        "    decision: hold\n    verbs: [create, patch]\n    resources: [pods, '*.example.com']\n"
        "    namespaces: [shop, 'ci-*']\n    names: web-*\n"
        "    where:\n      - {path: 'spec.containers[*].image', in: [a/*, b/*], absent: true}\n"
        "      - {path: spec.replicas, not_in: '0'}\n"
        "    masks:\n      - {resource: secrets, field: data.*, names: x, method: partial}\n"
        "      - {resource: pods, namespaces: kube-*, method: hide}\n"
        "  - {name: e, agents: A, targets: '*', decision: allow, verbs: create, resources: pods/exec, commands: ls}\n"
        "  - {name: f, agents: A, targets: '*', decision: allow, verbs: '*', resources: pods/portforward, ports: 80}\n"
        "  - {name: g, agents: A, targets: k, decision: allow, verbs: read, paths: [/metrics]}\n"
    )
    document = load(written(tmp_path, p=text))
    made, *more = document.rules
    assert made.requests == Requests(
        verbs=("create", "patch"),
        resources=("pods", "*.example.com"),
        namespaces=("shop", "ci-*"),
        names=("web-*",),
        where=(
            Where("spec.containers[*].image", ("a/*", "b/*"), (), True),
            Where("spec.replicas", (), ("0",), False),
        ),
    )
    assert made.object_masks == (
        ObjectMask("secrets", (), ("x",), "data.*", "partial"),
        ObjectMask("pods", ("kube-*",), (), "", "hide"),
    )
    assert [each.requests for each in more] == [
        Requests(("create",), ("pods/exec",), commands=("ls",)),
        Requests(("*",), ("pods/portforward",), ports=(80,)),
        Requests(("read",), paths=("/metrics",)),
    ]
    cluster, database = resolve(document, names).targets
    assert (cluster.protocol, database.protocol) == ("kubernetes", "postgresql")
    assert {endpoint.port for endpoint in cluster.endpoints} == {6443}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("    decision: allow\n    verbs: get", "p.yaml:10: rule `r` has no `resources`, and no `paths`"),
        ("    decision: allow\n    resources: pods", "p.yaml:9: rule `r` decides on no `verbs`"),
        ("    verbs: get\n    resources: pods", "p.yaml:6: rule `r` has no `decision`"),
        (
            "    decision: allow\n    verbs: [get, fetch]\n    resources: pods",
            "p.yaml:10: unknown verb `fetch` for `resources`",
        ),
        (
            "    decision: allow\n    verbs: post\n    resources: pods",
            "p.yaml:10: unknown verb `post` for `resources` in rule `r`: post is create, put is update",
        ),
        ("    decision: allow\n    verbs: list\n    paths: /x", "p.yaml:10: unknown verb `list` for `paths`"),
        ("    decision: allow\n    verbs: get\n    paths: x", "p.yaml:11: `x` is not a path: it starts with `/`"),
        (
            "    decision: allow\n    verbs: get\n    paths: /x\n    resources: pods",
            "p.yaml:11: `paths` are in place of",
        ),
        ("    decision: allow\n    verbs: get\n    paths: /x\n    names: a", "p.yaml:12: `names` is of `resources`"),
        (
            "    decision: deny\n    verbs: delete\n    resources: [pods, deployments]",
            "p.yaml:11: `deployments` is no resource of the core group: write `deployments.apps`",
        ),
        (
            "    decision: deny\n    verbs: delete\n    resources: pod",
            "p.yaml:11: `pod` is no resource of the core group",
        ),
        ("    decision: deny\n    verbs: delete\n    resources: Pods", "p.yaml:11: `Pods` is not a resource"),
        ("    decision: deny\n    verbs: delete\n    resources: pods/a/b", "p.yaml:11: `pods/a/b` is not a resource"),
        (
            "    decision: deny\n    verbs: get\n    resources: [pods/exec, pods/attach]",
            "p.yaml:10: the verb of `attach`, `exec` is always `create`",
        ),
        (PODS + "    commands: ls", "p.yaml:12: `commands` is of `pods/exec`"),
        (PODS + "    ports: 80", "p.yaml:12: `ports` is of `pods/portforward`"),
        (PODS.replace("pods", "pods/portforward") + "    ports: [80, 0]", "p.yaml:12: `0` is not a port"),
        (PODS + "    names: ['']", "p.yaml:12: an empty glob fits nothing"),
        (
            PODS + "    where: [{path: spec.x}]",
            "p.yaml:12: a condition on `spec.x` needs `in`, `not_in` or `absent: true`",
        ),
        (PODS + "    where: [{path: 'spec[0]', in: a}]", "p.yaml:12: `[0]` in `spec[0]`: in brackets stands"),
        (PODS + "    where: [{path: '[*].a', in: a}]", "p.yaml:12: `[*].a` starts with a star"),
        (PODS + "    where: [{path: .a, in: a}]", "p.yaml:12: `.a` starts with `.`"),
        (PODS + "    where: [{path: a..b, in: a}]", "p.yaml:12: `.b` in `a..b` is not a field"),
        (PODS + "    where: [{path: a, absent: 1}]", "p.yaml:12: `absent` wants true or false, `1` is a number"),
        (
            PODS + "    where: [{path: a, in: true}]",
            "p.yaml:12: `in` wants text, `true` is a boolean: put it in quotes",
        ),
        (
            PODS.replace("[create]", "write") + "    where: [{path: a, in: b}]",
            "p.yaml:12: `where` looks at bodies: `verbs` can be create, update, patch",
        ),
        (PODS + "    statements: select", "p.yaml:12: rule `r` speaks of SQL and of requests: `statements`"),
        (
            "    decision: allow\n    statements: select\n    namespaces: a",
            "p.yaml:11: rule `r` speaks of SQL and of requests: `namespaces`",
        ),
        (
            "    decision: allow\n    statements: select",
            "p.yaml:8: target `k` is `kubernetes`, `statements` in `r` is not",
        ),
        (PODS.replace("    dec", "    targets: [k, p]\n    dec", 1), "p.yaml:9: key `targets` is given twice"),
        (
            PODS + "    masks: [{column: a.b.c, method: hash}]",
            "p.yaml:12: rule `r` speaks of SQL and of requests: `masks`",
        ),
        ("    masks: [{method: hash}]", "p.yaml:9: a mask needs `column`, or `resource` and `field`, and not both"),
        ("    masks: [{resource: secrets, method: hash}]", "p.yaml:9: a mask on `secrets` needs a `field`, or"),
        (
            "    masks: [{resource: secrets, field: data, method: hide}]",
            "p.yaml:9: `hide` leaves out objects: it has no `field`",
        ),
        ("    masks: [{resource: 'secret*', field: data, method: hash}]", "p.yaml:9: `secret*`: a mask names one"),
        ("    masks: [{resource: pods/log, field: data, method: hash}]", "p.yaml:9: `pods/log`: a mask names one"),
        ("    masks: [{resource: pods, names: 'a?', method: hide}]", "p.yaml:9: `a?` is no glob on names"),
        ("    masks: [{resource: jobs, field: spec, method: hash}]", "p.yaml:9: `jobs` is no resource of the core"),
        ("    masks: [{resource: pods, field: metadata.*, method: hash}]", "p.yaml:9: `metadata.*`: clients need kind"),
        ("    masks: [{resource: pods, field: metadata, method: hash}]", "p.yaml:9: `metadata`: clients need kind"),
        (
            "    masks:\n      - {resource: pods, field: a, method: hash}\n"
            "      - {resource: pods, field: a, method: redact}",
            "p.yaml:11: `a` of `pods` is masked twice",
        ),
    ],
)
def test_a_rule_on_requests_is_checked(tmp_path: Path, rule: str, said: str) -> None:
    found = problems(tmp_path, CLUSTER + rule)
    assert [problem for problem in found if problem.startswith(said)], found


def test_targets_and_words_have_to_be_of_one_protocol(tmp_path: Path) -> None:
    text = CLUSTER.replace("targets: k\n", "targets: [k, p]\n") + PODS
    assert problems(tmp_path, text) == ["p.yaml:8: target `p` is `postgresql`, `verbs` in `r` is not"]
    text = CLUSTER.replace("targets: k\n", "targets: p\n") + "    masks: [{resource: pods, field: a, method: hash}]"
    assert problems(tmp_path, text) == ["p.yaml:8: target `p` is `postgresql`, `masks` in `r` is not"]
    text = CLUSTER.replace("targets: k\n", "targets: p\n") + "    masks: [{column: a.b.c, method: hide}]"
    assert problems(tmp_path, text) == ["p.yaml:9: `hide` is for a `resource`, not for a column"]
    text = CLUSTER.replace("targets: k\n", "targets: p\n") + "    masks: [{column: a.b.c, names: x, method: hash}]"
    assert problems(tmp_path, text) == ["p.yaml:9: `names` of a mask is for a `resource`, not for a column"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("tls: {mode: require}", "`require`: an API server is spoken to by verify-full or verify-ca"),
        ("tls: {mode: disable}", "`disable`: an API server is spoken to by verify-full or verify-ca"),
        ("databases: x", "an API server has no `databases`: use `namespaces` in rules"),
    ],
)
def test_an_api_server_is_checked(tmp_path: Path, more: str, said: str) -> None:
    text = CLUSTER.split("rules:")[0].replace("credential: c}\n  p", f"credential: c, {more}}}\n  p")
    assert problems(tmp_path, text) == [f"p.yaml:3: {said}"]
