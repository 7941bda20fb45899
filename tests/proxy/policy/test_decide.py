"""What a chain may do: the semantics of rules, hops, holds, masks and housekeeping, on real SQL."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.model import Decision, Endpoint, Operation, OperationKind, Phase, Ruling, Target
from proxy.policy import CompiledPolicy, Judge, Rule, load, resolve
from proxy.policy.document import Agent, Document, Mask, NamedTarget
from proxy.policy.document import Host as Address
from proxy.protocols.postgres.classify import Unclassified, classify

ALLOW, HOLD, DENY = Decision.ALLOW, Decision.HOLD, Decision.DENY
KEY = bytes(32)


def rule(name: str, decision: str | None, statements: str = "select", **more: object) -> Rule:
    """A rule for agent A at any target, unless said otherwise."""
    fields: dict[str, object] = {
        "agents": ("A",),
        "targets": ("*",),
        "relations": (),
        "functions": (),
        "timeout_s": 60.0,
        "hint": "",
        "masks": (),
    }
    fields |= {
        key: tuple(value.split()) if isinstance(value, str) and key != "hint" else value for key, value in more.items()
    }
    words = tuple(statements.split()) if decision else ()
    return Rule(name=name, decision=decision, statements=words, **fields)  # type: ignore[arg-type]


def policy(*rules: Rule) -> CompiledPolicy:
    target = NamedTarget(
        name="orders",
        protocol="postgresql",
        hosts=(Address("203.0.113.10", 5432, "here"),),
        server_name="db.example",
        tls_mode="verify-full",  # type: ignore[arg-type]
        ca_pem="",
        credential="c",
        databases=("shop",),
    )
    agents = tuple(Agent(name, f"/{name}") for name in "ABC")
    return CompiledPolicy(resolve(Document(agents, (target,), rules, {5432: "postgresql"}), lambda name: []), KEY)


def target_of(compiled: CompiledPolicy) -> Target:
    return compiled.targets["orders"]


def judge(*rules: Rule, chain: str = "A") -> Judge:
    compiled = policy(*rules)
    return compiled.bind(tuple(chain.split()), target_of(compiled), "shop")


def operation(sql: str, phase: Phase = Phase.EXECUTE) -> Operation:
    try:
        statements, why = classify(sql), ""
    except Unclassified as error:
        statements, why = (), str(error)
    return Operation("postgresql", OperationKind.QUERY, phase, sql, sql, statements, why)


def ruled(judge: Judge, sql: str) -> Ruling:
    return judge.decide(operation(sql))


def decided(judge: Judge, sql: str) -> Decision:
    return ruled(judge, sql).decision


READ = rule("read", "allow", relations="public.customers public.orders")

# --- one hop ----------------------------------------------------------------------------------------------------------


def test_nothing_is_allowed_by_default_and_the_message_names_target_hop_and_rule() -> None:
    ruling = ruled(judge(READ), "DROP TABLE public.customers")
    assert ruling.decision == DENY
    assert ruling.message == "target `orders`: agent `A` may not drop-table public.customers (no rule allows it)"
    assert ruling.hint == "ask those who keep the policy for a rule that allows `drop-table` there"
    (reason,) = ruling.reasons
    assert (reason.hop, reason.rule, reason.decision) == ("A", "[no rule allows it]", DENY)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_deny_beats_hold_beats_allow_in_any_order(order: tuple[int, ...]) -> None:
    rules = [
        rule("a", "allow", "select update delete"),
        rule("h", "hold", "update delete"),
        rule("d", "deny", "delete", hint="leave it"),
    ]
    bound = judge(*(rules[index] for index in order))
    assert decided(bound, "SELECT * FROM customers") == ALLOW
    assert decided(bound, "UPDATE customers SET a = 1") == HOLD
    ruling = ruled(bound, "DELETE FROM customers")
    assert (ruling.decision, ruling.hint) == (DENY, "leave it")
    assert ruling.message == "target `orders`: agent `A` may not delete customers (rule `d`)"


def test_every_statement_of_a_string_has_to_be_allowed() -> None:
    bound = judge(READ, rule("u", "hold", "update", relations="public.orders"))
    assert decided(bound, "SELECT * FROM customers; SELECT * FROM orders") == ALLOW
    assert decided(bound, "SELECT * FROM customers; UPDATE orders SET a = 1") == HOLD
    assert decided(bound, "UPDATE orders SET a = 1; DROP TABLE orders") == DENY
    assert decided(bound, "") == ALLOW


def test_every_relation_has_to_be_covered_and_rules_add_up() -> None:
    one, two = rule("one", "allow", relations="public.a"), rule("two", "allow", relations="public.b")
    assert decided(judge(one, two), "SELECT * FROM a JOIN b ON true") == ALLOW
    assert decided(judge(one), "SELECT * FROM a JOIN b ON true") == DENY
    assert decided(judge(one, two), "SELECT * FROM a WHERE x IN (SELECT 1 FROM c)") == DENY
    assert ruled(judge(one, two), "SELECT * FROM a, b").reasons[0].rule == "one, two"


def test_what_a_changing_statement_reads_needs_select() -> None:
    insert = rule("insert", "allow", "insert", relations="public.a")
    assert decided(judge(insert), "INSERT INTO a VALUES (1)") == ALLOW
    assert decided(judge(insert), "INSERT INTO a SELECT * FROM customers") == DENY
    assert decided(judge(insert, READ), "INSERT INTO a SELECT * FROM customers") == ALLOW
    assert decided(judge(insert), "INSERT INTO a VALUES (1) RETURNING *") == DENY
    assert decided(judge(READ), "WITH x AS (DELETE FROM customers RETURNING *) SELECT * FROM x") == DENY
    assert decided(judge(READ), "SELECT * FROM customers FOR UPDATE") == DENY
    assert decided(judge(READ), "EXPLAIN DELETE FROM customers") == ALLOW
    assert decided(judge(READ), "EXPLAIN ANALYZE DELETE FROM customers") == DENY
    assert decided(judge(READ), "COPY customers TO STDOUT") == DENY
    assert decided(judge(READ), "SELECT * INTO b FROM customers") == DENY


def test_a_name_without_schema_is_publics_for_a_grant_and_anybodys_for_a_restriction() -> None:
    other = rule("other", "allow", relations="other.*")
    assert decided(judge(other), "SELECT * FROM customers") == DENY
    assert decided(judge(other), "SELECT * FROM other.customers") == ALLOW
    deny = rule("d", "deny", relations="secret.customers")
    assert decided(judge(READ, deny), "SELECT * FROM customers") == DENY
    assert decided(judge(READ, deny), "SELECT * FROM public.customers") == ALLOW


def test_a_rule_without_relations_covers_all_but_the_servers_own() -> None:
    every = rule("every", "allow", "* ")
    assert decided(judge(every), "SELECT * FROM s.x") == ALLOW
    assert decided(judge(every), "DO $$ BEGIN END $$") == ALLOW
    for secret in ("pg_authid", "pg_catalog.pg_authid", "pg_stats", "pg_toast.pg_toast_1", "pg_stat_activity"):
        assert decided(judge(every), f"SELECT * FROM {secret}") == DENY
        assert decided(judge(rule("star", "allow", relations="* *.*")), f"SELECT * FROM {secret}") == DENY
    named = rule("named", "allow", relations="pg_catalog.pg_authid")
    assert decided(judge(named), "SELECT * FROM pg_catalog.pg_authid") == ALLOW


def test_a_rule_with_relations_grants_nothing_to_statements_without() -> None:
    scoped = rule("scoped", "allow", "*", relations="public.*")
    assert decided(judge(scoped), "DO $$ BEGIN END $$") == DENY
    assert decided(judge(scoped), "CREATE TABLE x (y int)") == ALLOW


def test_functions_have_to_be_safe_or_named() -> None:
    assert decided(judge(READ), "SELECT lower(name), count(*) FROM customers") == ALLOW
    assert decided(judge(READ), "SELECT purge(name) FROM customers") == DENY
    named = rule("named", "allow", functions="purge other.f")
    for sql in ("SELECT purge(1)", "SELECT public.purge(1)", "SELECT other.f()", "SELECT purge(name) FROM customers"):
        assert decided(judge(READ, named), sql) == ALLOW
    for sql in ("SELECT f()", "SELECT s.purge()", 'SELECT "pg_catalog.lower"(1)', "SELECT 1 <%> 2"):
        assert decided(judge(READ, named), sql) == DENY
    assert decided(judge(named), "SELECT purge(name) FROM customers") == DENY, "it names no relation"
    assert decided(judge(rule("op", "allow", functions="<%>")), "SELECT 1 <%> 2") == ALLOW
    assert decided(judge(rule("call", "allow", "call", functions="p")), "CALL p(1)") == ALLOW
    assert decided(judge(rule("call", "allow", "call", functions="p")), "CALL q(1)") == DENY


@pytest.mark.parametrize(
    "call",
    [
        "pg_read_file('/etc/passwd')",
        "pg_catalog.pg_read_file('/etc/passwd')",
        "query_to_xml('drop table x', true, true, '')",
        "lo_import('/etc/passwd')",
        "set_config(x, 'y', false)",
        "pg_terminate_backend(1)",
        "table_to_xml('customers', true, true, '')",
        "ts_stat('select 1')",
        "pg_stat_get_activity(NULL)",
        "nextval(x)",
        "pg_notify('a', 'b')",
    ],
)
def test_unsafe_built_in_functions_have_to_be_spelled_out(call: str) -> None:
    every = rule("every", "allow", "*")
    stars = rule("stars", "allow", "*", functions="* pg_catalog.* pg_*")
    assert decided(judge(every, stars), f"SELECT {call} FROM customers") == DENY
    name = call.partition("(")[0].rpartition(".")[2]
    assert decided(judge(every, rule("named", "allow", "*", functions=name)), f"SELECT {call} FROM customers") == ALLOW


def test_a_deny_on_functions_needs_one_of_them_called() -> None:
    deny = rule("no-sleep", "deny", functions="pg_sleep")
    assert decided(judge(READ, deny), "SELECT * FROM customers") == ALLOW
    assert decided(judge(READ, deny), "SELECT pg_sleep(1)") == DENY
    assert decided(judge(READ, deny), "SELECT pg_catalog.pg_sleep(1) FROM customers") == DENY


def test_sequences_are_written_by_nextval() -> None:
    assert decided(judge(READ), "SELECT nextval('orders_id_seq')") == DENY
    granted = rule("seq", "allow", "nextval", relations="public.orders_id_seq")
    assert decided(judge(granted), "SELECT nextval('orders_id_seq'::regclass)") == ALLOW
    assert decided(judge(granted), "SELECT setval('orders_id_seq', 1)") == DENY


def test_what_cannot_be_classified_is_denied_with_its_reason() -> None:
    ruling = ruled(judge(rule("every", "allow", "*")), "SELEC 1")
    assert (ruling.decision, ruling.reasons[0].rule) == (DENY, "[unclassified]")
    assert "syntax error" in ruling.message


# --- housekeeping -----------------------------------------------------------------------------------------------------

CHORES = """
BEGIN
COMMIT
ROLLBACK
SAVEPOINT s
RELEASE s
ROLLBACK TO s
SET CONSTRAINTS ALL DEFERRED
DEALLOCATE ALL
DISCARD ALL
UNLISTEN *
CLOSE ALL
EXECUTE p(1)
FETCH 10 FROM c
RESET ALL
SET application_name = 'x'
SET client_encoding = 'UTF8'
SET NAMES 'latin1'
SET DateStyle = ISO
SET TIME ZONE 'UTC'
SET TRANSACTION ISOLATION LEVEL SERIALIZABLE
SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY
SHOW server_version
SHOW search_path
SHOW transaction isolation level
SELECT 1
SELECT now(), version(), current_user, current_setting('server_version_num'), pg_backend_pid()
SELECT current_setting('jit') AS cur, set_config('jit', 'off', false) AS new
SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL
SELECT oid, typname FROM pg_type WHERE typname = 'hstore'
SELECT c.relname FROM pg_catalog.pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace ORDER BY 1
SELECT * FROM information_schema.columns
WITH RECURSIVE t AS (SELECT oid FROM pg_type UNION SELECT typelem FROM pg_type JOIN t USING (oid)) SELECT * FROM t
SELECT (information_schema._pg_expandarray(i.indkey)).n FROM pg_index i
PREPARE p AS SELECT 1
DECLARE c CURSOR FOR SELECT * FROM pg_class
"""

NO_CHORES = """
SET search_path = x
SET LOCAL search_path = x
SELECT set_config('search_path', 'x', false)
SET ROLE postgres
SET SESSION AUTHORIZATION postgres
SET row_security = off
SET session_replication_role = replica
SET standard_conforming_strings = off
SELECT set_config('standard_conforming_strings', 'off', false)
SET client_encoding = 'big5'
SET work_mem = '10GB'
SET x.y = 'z'
SET TRANSACTION SNAPSHOT 'x'
SHOW ALL
SHOW primary_conninfo
SHOW app.secret
SELECT * FROM pg_authid
SELECT * FROM pg_catalog.pg_shadow
SELECT * FROM pg_stats
SELECT * FROM pg_stat_activity
SELECT * FROM pg_user_mappings
SELECT * FROM pg_subscription
SELECT * FROM information_schema.user_mapping_options
SELECT * FROM other.pg_class
SELECT * FROM pg_class FOR UPDATE
UPDATE pg_settings SET setting = 'x'
LISTEN c
NOTIFY c
LOCK customers
LOAD 'x'
PREPARE TRANSACTION 'x'
PREPARE p AS DELETE FROM customers
EXECUTE p(purge())
"""


@pytest.mark.parametrize("sql", CHORES.strip().splitlines())
def test_housekeeping_is_allowed_unless_a_rule_denies_it(sql: str) -> None:
    assert decided(judge(READ), sql) == ALLOW
    assert decided(judge(READ, rule("none", "deny", "*")), sql) == DENY
    assert decided(judge(READ, rule("wait", "hold", "*")), sql) == ALLOW


@pytest.mark.parametrize("sql", NO_CHORES.strip().splitlines())
def test_what_is_more_than_housekeeping_needs_a_rule(sql: str) -> None:
    assert decided(judge(READ), sql) == DENY


@pytest.mark.parametrize("sql", NO_CHORES.strip().splitlines()[:10])
def test_no_rule_lets_a_session_change_what_names_and_texts_mean(sql: str) -> None:
    ruling = ruled(judge(rule("all", "allow", "*"), rule("also", "allow", "*", functions="*")), sql)
    assert ruling.decision == DENY
    assert ruling.reasons[0].rule in ("[fixed setting]", "[no rule allows it]")


def test_a_hold_can_be_put_on_housekeeping_by_naming_it() -> None:
    assert decided(judge(READ, rule("h", "hold", functions="pg_sleep")), "SELECT pg_sleep(1)") == HOLD
    assert decided(judge(READ, rule("h", "hold", relations="pg_catalog.pg_class")), "SELECT * FROM pg_class") == HOLD


def test_a_hop_without_any_rule_may_not_even_keep_house() -> None:
    assert decided(judge(), "SELECT 1") == DENY
    assert decided(judge(READ, chain="A B"), "BEGIN") == DENY
    assert decided(judge(rule("d", "deny")), "BEGIN") == DENY


# --- hold and phases --------------------------------------------------------------------------------------------------


def test_a_hold_says_what_waits_and_for_how_long() -> None:
    rules = [
        rule("h1", "hold", "update", relations="public.orders", timeout_s=300.0, hint="ask in #dba"),
        rule("h2", "hold", "update", timeout_s=20.0),
    ]
    ruling = ruled(judge(*rules), "UPDATE orders SET a = 1")
    assert (ruling.decision, ruling.hold_timeout_s, ruling.hint) == (HOLD, 20.0, "ask in #dba")
    assert ruling.message == "target `orders`: agent `A` needs approval to update orders (rule `h1, h2`)"


def test_a_hold_grants_only_what_it_names() -> None:
    held = rule("h", "hold", "select", functions="purge")
    assert decided(judge(held), "SELECT purge()") == HOLD
    assert decided(judge(held), "SELECT * FROM customers") == DENY
    assert decided(judge(held), "SELECT purge() FROM customers") == DENY
    assert decided(judge(held, READ), "SELECT purge() FROM customers") == HOLD
    assert decided(judge(rule("h", "hold", "update", relations="public.a")), "UPDATE b SET x = 1") == DENY


def test_preparing_is_denied_where_execution_is_and_never_held() -> None:
    bound = judge(rule("h", "hold", "update"), READ)
    prepared = bound.decide(operation("UPDATE customers SET a = 1", Phase.PREPARE))
    assert prepared.decision == ALLOW
    assert "held when executed" in prepared.message
    assert prepared.reasons[0].rule == "h"
    assert bound.decide(operation("DELETE FROM customers", Phase.PREPARE)).decision == DENY


def test_sqls_own_prepare_cannot_be_approved_for_later() -> None:
    ruling = ruled(judge(rule("h", "hold", "update")), "PREPARE p AS UPDATE customers SET a = 1")
    assert (ruling.decision, ruling.hint) == (DENY, "send the statement itself: each execution is approved")


# --- the chain --------------------------------------------------------------------------------------------------------


def test_no_hop_has_more_than_the_one_before() -> None:
    rules = [READ, rule("b", "allow", "select delete drop-table", agents="B")]
    assert decided(judge(*rules, chain="B"), "DELETE FROM orders") == ALLOW
    assert decided(judge(*rules, chain="A B"), "DELETE FROM orders") == DENY
    assert decided(judge(*rules, chain="B A"), "DELETE FROM orders") == DENY
    assert decided(judge(*rules, chain="A B"), "SELECT * FROM orders") == ALLOW


def test_there_is_one_reason_a_hop_root_first_and_the_nearest_is_told() -> None:
    rules = [READ, rule("b", "allow", agents="B"), rule("c", "deny", "drop-table", agents="B")]
    ruling = ruled(judge(*rules, chain="A B"), "DROP TABLE orders")
    assert [(reason.hop, reason.rule) for reason in ruling.reasons] == [("A", "[no rule allows it]"), ("B", "c")]
    assert ruling.message == "target `orders`: agent `B` may not drop-table orders (rule `c`)"


def test_the_shortest_hold_of_all_hops_counts() -> None:
    rules = [
        rule("a", "hold", "update", timeout_s=60.0),
        rule("b", "hold", "update", agents="B", timeout_s=30.0),
        rule("c", "allow", "update", agents="C"),
    ]
    ruling = ruled(judge(*rules, chain="A B C"), "UPDATE orders SET a = 1")
    assert (ruling.decision, ruling.hold_timeout_s) == (HOLD, 30.0)
    assert [reason.decision for reason in ruling.reasons] == [HOLD, HOLD, ALLOW]


def test_a_star_is_every_agent_and_not_the_unattributed() -> None:
    star = rule("star", "allow", agents="*")
    assert decided(judge(star, chain="A"), "SELECT * FROM a") == ALLOW
    assert decided(judge(star, chain="unattributed"), "SELECT * FROM a") == DENY
    named = rule("named", "allow", agents="unattributed")
    assert decided(judge(named, chain="unattributed"), "SELECT * FROM a") == ALLOW
    assert decided(judge(star, chain="an-agent-of-an-older-policy"), "SELECT 1") == DENY


def test_a_rule_for_another_target_does_not_count() -> None:
    assert decided(judge(rule("other", "allow", targets="elsewhere")), "SELECT * FROM a") == DENY


STATEMENTS = ["SELECT * FROM a", "SELECT * FROM a, b", "UPDATE a SET x = 1", "DELETE FROM b", "SELECT f()", "BEGIN"]
RULES = st.builds(
    lambda name, agent, decision, statements, relations: rule(
        f"r{name}", decision, statements, agents=agent, relations=relations
    ),
    st.integers(0, 99),
    st.sampled_from(["A", "B", "*", "A B"]),
    st.sampled_from(["allow", "deny", "hold"]),
    st.sampled_from(["select", "write", "*", "select update", "delete"]),
    st.sampled_from(["", "public.a", "public.*", "public.a public.b"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(RULES, max_size=5, unique_by=lambda each: each.name), st.randoms(use_true_random=False))
def test_a_longer_chain_is_never_less_strict_and_order_never_matters(rules: list[Rule], random: object) -> None:
    shuffled = list(rules)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    alone, child, both = judge(*rules, chain="A"), judge(*rules, chain="B"), judge(*rules, chain="A B")
    again = judge(*shuffled, chain="A B")
    for sql in STATEMENTS:
        strictest = max(decided(alone, sql), decided(child, sql))
        assert decided(both, sql) == decided(again, sql) == strictest


# --- login ------------------------------------------------------------------------------------------------------------


def login(compiled: CompiledPolicy, chain: str, database: str = "shop") -> Ruling:
    return compiled.login(tuple(chain.split()), target_of(compiled), database)


def test_a_login_needs_a_granting_rule_for_each_hop_and_a_known_database() -> None:
    compiled = policy(
        READ,
        rule("b", "hold", "update", agents="B"),
        rule("c", "deny", "*", agents="C"),
        rule("m", None, agents="C", masks=(Mask("public", "a", "b", "redact"),)),
    )
    assert login(compiled, "A B").decision == ALLOW
    assert (
        login(compiled, "A C").message == "target `orders`: agent `C` may not log in (no rule allows it anything here)"
    )
    assert login(compiled, "unattributed").decision == DENY
    assert login(compiled, "").decision == DENY
    refused = login(compiled, "A B", "postgres")
    assert refused.message == "target `orders`: agent `B` may not open database `postgres` (target has `shop`)"
    assert refused.hint


def test_a_target_is_found_by_its_endpoint() -> None:
    compiled = policy()
    assert compiled.target_at(Endpoint("203.0.113.10", 5432)) is target_of(compiled)
    assert compiled.target_at(Endpoint("203.0.113.10", 5433)) is None
    assert (compiled.protocol_at(5432), compiled.protocol_at(22)) == ("postgresql", None)


def test_a_chain_without_principals_is_never_bound() -> None:
    with pytest.raises(ValueError, match="without principals"):
        judge(READ, chain="")


# --- masks ------------------------------------------------------------------------------------------------------------


def masks(name: str, agents: str, *columns: str, method: str = "redact") -> Rule:
    made = tuple(Mask("public", "customers", column, method) for column in columns)  # type: ignore[arg-type]
    return rule(name, None, agents=agents, masks=made)


EVERYTHING = rule("all", "allow", "*", agents="*", functions="*")
EVERY_RELATION = rule("relations", "allow", "*", agents="*")


def masked(*more: Rule, chain: str = "A") -> Judge:
    return judge(EVERYTHING, EVERY_RELATION, masks("m", "A", "email", "card"), *more, chain=chain)


def test_masks_are_united_and_the_strictest_method_wins() -> None:
    rules = [
        EVERY_RELATION,
        masks("a", "A", "email", method="partial"),
        masks("b", "B", "email", method="hash"),
        masks("b2", "B", "card", method="partial"),
        masks("c", "*", "card", method="redact"),
    ]
    assert [(mask.column, mask.label) for mask in judge(*rules, chain="A").masks] == [
        ("card", "redact"),
        ("email", "partial"),
    ]
    bound = judge(*rules, chain="A B")
    assert [(mask.column, mask.label) for mask in bound.masks] == [("card", "redact"), ("email", "hash")]
    assert bound.masks[0].mask(b"x" * 20) == b"***"
    assert bound.mask_signature == judge(*reversed(rules), chain="B A").mask_signature
    assert bound.mask_signature != judge(*rules, chain="A").mask_signature


def test_a_masked_column_may_be_read_plainly_and_nothing_else() -> None:
    bound = masked()
    for sql in ("SELECT email, card FROM customers", "TABLE customers", "SELECT id FROM customers WHERE id = 1"):
        assert decided(bound, sql) == ALLOW
    ruling = ruled(bound, "SELECT lower(card) FROM customers")
    assert ruling.decision == DENY
    assert ruling.message == (
        "target `orders`: agent `A` sees public.customers.card masked: "
        "naming `card` outside of a plain output column is not allowed (rule `m`)"
    )
    assert ruling.hint
    assert decided(bound, "SELECT row_to_json(c) FROM customers c") == DENY
    assert decided(bound, "COPY customers TO STDOUT") == DENY


def test_masks_concern_only_what_could_be_their_relation() -> None:
    bound = masked()
    for sql in ("SELECT lower(email) FROM people", "SELECT lower(email) FROM other.customers", "COPY people TO STDOUT"):
        assert decided(bound, sql) == ALLOW
    for sql in ("SELECT lower(email) FROM public.customers", "SELECT lower(p.email) FROM people p, customers c"):
        assert decided(bound, sql) == DENY


def test_a_mask_of_any_hop_binds_the_chain() -> None:
    bound = masked(rule("b", "allow", agents="B"), chain="A B")
    assert decided(bound, "SELECT lower(email) FROM customers") == DENY
    assert decided(masked(chain="B"), "SELECT lower(email) FROM customers") == ALLOW


@pytest.mark.parametrize(
    "sql",
    [
        "DO $$ BEGIN END $$",
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'select 1'",
        "CALL p()",
        "CREATE TRIGGER t BEFORE INSERT ON a EXECUTE FUNCTION f()",
        "CREATE RULE r AS ON INSERT TO a DO NOTHING",
        "ALTER SCHEMA public RENAME TO p",
        "COPY a TO PROGRAM 'sh'",
        "ALTER TABLE customers RENAME COLUMN email TO e",
        "ALTER TABLE customers RENAME TO c",
        "ALTER TABLE parent ATTACH PARTITION customers DEFAULT",
        "ALTER TABLE customers INHERIT parent",
        "CREATE TABLE x (y int REFERENCES customers)",
        "CREATE TABLE x () INHERITS (customers)",
        "CREATE INDEX ON customers (email)",
        "CREATE STATISTICS s ON email, card FROM customers",
        "CREATE PUBLICATION p FOR TABLE customers",
        "CREATE POLICY p ON customers USING (true)",
        "IMPORT FOREIGN SCHEMA a FROM SERVER s INTO b",
    ],
)
def test_with_masks_what_cannot_be_looked_into_is_denied(sql: str) -> None:
    assert decided(masked(), sql) == DENY
    assert decided(masked(chain="B"), sql) == ALLOW


@pytest.mark.parametrize(
    "sql", ["TRUNCATE customers", "DROP TABLE customers", "CREATE TABLE x (y int)", "BEGIN", "SHOW x"]
)
def test_with_masks_what_shows_nothing_goes_on(sql: str) -> None:
    assert decided(masked(), sql) == ALLOW


def test_every_column_of_a_derived_relation_is_masked() -> None:
    bound = masked()
    derived = bound.with_derived([("public", "customer_view"), ("public", "customers")])
    assert derived is bound.with_derived([("public", "customer_view")])
    assert bound.with_derived([]) is bound
    assert decided(bound, "SELECT lower(x) FROM customer_view") == ALLOW
    ruling = ruled(derived, "SELECT lower(x) FROM customer_view")
    assert (ruling.decision, ruling.reasons[0].rule) == (DENY, "m")
    assert "sees public.customer_view masked, as it shows masked columns: naming `x`" in ruling.message
    for sql in (
        "SELECT v FROM customer_view v",
        "SELECT 1 FROM customer_view WHERE x = 1",
        "COPY customer_view TO STDOUT",
    ):
        assert decided(derived, sql) == DENY
    for sql in ("SELECT x, y FROM customer_view", "SELECT count(*) FROM customer_view", "SELECT lower(x) FROM people"):
        assert decided(derived, sql) == ALLOW
    assert derived.masks == bound.masks


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_ruling_is_kept_by_the_operations_identity_and_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = judge(READ)
    same = operation("SELECT 1")
    assert bound.decide(same) is bound.decide(same)
    assert bound.decide(replace(same)) is not bound.decide(same)
    monkeypatch.setattr("proxy.policy.decide.MAX_CACHED", 10)
    for _ in range(100):
        bound.decide(operation("SELECT 1"))
    assert len(bound._cache) <= 10


def test_sessions_with_the_same_chain_share_a_judge() -> None:
    compiled = policy(READ)
    target = target_of(compiled)
    assert compiled.bind(("A",), target, "shop") is compiled.bind(("A",), target, "other")
    for index in range(3000):
        compiled.bind((f"x{index}",), target, "shop")
    assert len(compiled._judges) <= 1024


def test_a_policy_read_from_a_file_rules_alike(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        """
agents: {A: {exe: /A}}
targets: {orders: {protocol: postgresql, addresses: 203.0.113.10, credential: c}}
rules: [{name: r, agents: A, targets: orders, statements: select, relations: public.customers, decision: allow}]
"""
    )
    compiled = CompiledPolicy(resolve(load(tmp_path), lambda name: []), KEY)
    bound = compiled.bind(("A",), target_of(compiled), "shop")
    ruling = ruled(bound, "SELECT * FROM customers")
    assert (ruling.decision, ruling.policy_version) == (ALLOW, compiled.version)
