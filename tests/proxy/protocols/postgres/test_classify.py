"""Every statement gets its documented kind, its relations and its functions; what is not known is unclassified."""

from __future__ import annotations

import inspect
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pglast import ast

from proxy.model import Relation, StatementFacts
from proxy.policy import vocabulary
from proxy.protocols.postgres import classify as module
from proxy.protocols.postgres.classify import Unclassified, classify


def one(sql: str) -> StatementFacts:
    (facts,) = classify(sql)
    return facts


def names(relations: frozenset[Relation]) -> set[str]:
    return set(map(str, relations))


def kinds(sql: str) -> list[str]:
    return [part.kind for part in one(sql).parts]


KINDS = {
    "SELECT 1": "select",
    "TABLE a": "select",
    "VALUES (1)": "select",
    "SELECT * INTO b FROM a": "select-into",
    "INSERT INTO a VALUES (1)": "insert",
    "UPDATE a SET x = 1": "update",
    "DELETE FROM a": "delete",
    "MERGE INTO a USING b ON a.x = b.x WHEN MATCHED THEN DELETE": "merge",
    "TRUNCATE a": "truncate",
    "COPY a TO STDOUT": "copy-out",
    "COPY (SELECT 1) TO STDOUT": "copy-out",
    "COPY a FROM STDIN": "copy-in",
    "COPY a FROM '/etc/passwd'": "copy-file",
    "COPY a TO PROGRAM 'sh'": "copy-program",
    "COPY a FROM PROGRAM 'sh'": "copy-program",
    "DECLARE c CURSOR FOR SELECT 1": "select",
    "FETCH ALL FROM c": "fetch",
    "MOVE 1 FROM c": "move",
    "CLOSE c": "close",
    "PREPARE p AS SELECT 1": "prepare",
    "EXECUTE p(1)": "execute",
    "DEALLOCATE p": "deallocate",
    "DISCARD ALL": "discard",
    "BEGIN": "begin",
    "START TRANSACTION READ ONLY": "begin",
    "END": "commit",
    "ABORT": "rollback",
    "SAVEPOINT s": "savepoint",
    "RELEASE s": "release",
    "ROLLBACK TO s": "rollback-to",
    "PREPARE TRANSACTION 'x'": "prepare-transaction",
    "COMMIT PREPARED 'x'": "commit-prepared",
    "ROLLBACK PREPARED 'x'": "rollback-prepared",
    "SET CONSTRAINTS ALL DEFERRED": "set-constraints",
    "SET application_name = 'x'": "set",
    "SET ROLE x": "set",
    "RESET ALL": "reset",
    "SET x.y TO DEFAULT": "reset",
    "SHOW ALL": "show",
    "LISTEN c": "listen",
    "UNLISTEN *": "unlisten",
    "NOTIFY c, 'x'": "notify",
    "LOCK TABLE a": "lock-table",
    "LOAD 'x'": "load",
    "DO $$ BEGIN END $$": "do",
    "CALL p(1)": "call",
    "EXPLAIN DELETE FROM a": "select",
    "EXPLAIN (ANALYZE off) DELETE FROM a": "select",
    "EXPLAIN ANALYZE DELETE FROM a": "delete",
    "EXPLAIN (VERBOSE, ANALYZE) DELETE FROM a": "delete",
    "EXPLAIN (ANALYZE 1) DELETE FROM a": "delete",
    "EXPLAIN EXECUTE p": "execute",
    "EXPLAIN ANALYZE CREATE TABLE b AS SELECT 1": "create-table-as",
    "CREATE TABLE a (x int)": "create-table",
    "CREATE TABLE b AS SELECT 1": "create-table-as",
    "CREATE MATERIALIZED VIEW b AS SELECT 1": "create-materialized-view",
    "CREATE VIEW b AS SELECT 1": "create-view",
    "REFRESH MATERIALIZED VIEW b": "refresh-materialized-view",
    "CREATE INDEX ON a (x)": "create-index",
    "CREATE SEQUENCE s": "create-sequence",
    "ALTER SEQUENCE s RESTART": "alter-sequence",
    "CREATE SCHEMA s CREATE TABLE t (x int)": "create-schema",
    "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'select 1'": "create-function",
    "CREATE PROCEDURE f() LANGUAGE sql AS 'select 1'": "create-procedure",
    "CREATE TRIGGER t BEFORE INSERT ON a FOR EACH ROW EXECUTE FUNCTION f()": "create-trigger",
    "CREATE RULE r AS ON INSERT TO a DO NOTHING": "create-rule",
    "CREATE POLICY p ON a": "create-policy",
    "CREATE EXTENSION dblink": "create-extension",
    "CREATE ROLE r": "create-role",
    "CREATE USER r": "create-role",
    "ALTER ROLE r SET search_path = x": "alter-role",
    "DROP ROLE r": "drop-role",
    "CREATE DATABASE d": "create-database",
    "DROP DATABASE d": "drop-database",
    "ALTER DATABASE d SET x = 1": "alter-database",
    "CREATE TYPE t AS (x int)": "create-type",
    "CREATE TYPE t AS ENUM ('a')": "create-type",
    "CREATE DOMAIN d AS int": "create-domain",
    "CREATE AGGREGATE a(int) (sfunc = f, stype = int)": "create-aggregate",
    "CREATE OPERATOR + (leftarg = int, rightarg = int, function = f)": "create-operator",
    "CREATE CAST (int AS text) WITH INOUT": "create-cast",
    "CREATE PUBLICATION p FOR ALL TABLES": "create-publication",
    "CREATE SUBSCRIPTION s CONNECTION 'host=x' PUBLICATION p": "create-subscription",
    "CREATE SERVER s FOREIGN DATA WRAPPER f": "create-server",
    "CREATE USER MAPPING FOR u SERVER s": "create-user-mapping",
    "CREATE FOREIGN TABLE t (x int) SERVER s": "create-foreign-table",
    "IMPORT FOREIGN SCHEMA a FROM SERVER s INTO b": "import-foreign-schema",
    "CREATE STATISTICS s ON x, y FROM a": "create-statistics",
    "CREATE TEXT SEARCH DICTIONARY d (template = simple)": "create-text-search",
    "ALTER TABLE a ADD x int": "alter-table",
    "ALTER TABLE a RENAME COLUMN x TO y": "alter-table",
    "ALTER TABLE a RENAME TO b": "alter-table",
    "ALTER TABLE a SET SCHEMA s": "alter-table",
    "ALTER VIEW v OWNER TO x": "alter-view",
    "ALTER INDEX i RENAME TO j": "alter-index",
    "ALTER SCHEMA s RENAME TO t": "alter-schema",
    "ALTER FUNCTION f() OWNER TO x": "alter-function",
    "ALTER TYPE t ADD VALUE 'x'": "alter-type",
    "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO a": "alter-default-privileges",
    "ALTER SYSTEM SET x = 1": "alter-system",
    "ALTER LARGE OBJECT 1 OWNER TO x": "alter-large-object",
    "DROP TABLE a": "drop-table",
    "DROP VIEW a": "drop-view",
    "DROP SCHEMA a": "drop-schema",
    "DROP FUNCTION f()": "drop-function",
    "DROP TRIGGER t ON a": "drop-trigger",
    "DROP OWNED BY a": "drop-owned",
    "REASSIGN OWNED BY a TO b": "reassign-owned",
    "COMMENT ON TABLE a IS 'x'": "comment",
    "SECURITY LABEL ON TABLE a IS 'x'": "security-label",
    "GRANT SELECT ON a TO b": "grant",
    "REVOKE SELECT ON a FROM b": "revoke",
    "GRANT a TO b": "grant-role",
    "REVOKE a FROM b": "revoke-role",
    "VACUUM a": "vacuum",
    "ANALYZE a": "analyze",
    "REINDEX TABLE a": "reindex",
    "CLUSTER a": "cluster",
    "CHECKPOINT": "checkpoint",
}


@pytest.mark.parametrize("sql", KINDS)
def test_a_statement_has_its_kind(sql: str) -> None:
    assert one(sql).kind == KINDS[sql]


def test_every_statement_node_of_the_grammar_has_a_handler() -> None:
    nodes = {name for name in vars(ast) if name.endswith("Stmt")}
    inside = {"RawStmt", "SetOperationStmt", "PLAssignStmt", "ReturnStmt", "ReplicaIdentityStmt"}
    assert nodes - inside == set(module._STATEMENTS) - inside


def test_every_kind_is_in_the_policys_vocabulary_and_can_be_made() -> None:
    """The two tables are kept apart by the import contract; here they meet."""
    made = set(KINDS.values()) | {"select-for-update", "nextval", "setval"}
    assert made <= vocabulary.KINDS
    source = {f"{verb}-{noun}" for verb in ("create", "alter", "drop") for noun in module._NOUNS.values()}
    assert source - {"create-large-object", "drop-large-object"} <= vocabulary.KINDS
    written = set(re.findall(r'"((?:create|alter|drop)-[a-z-]+)"', inspect.getsource(module)))
    assert written <= vocabulary.KINDS


def test_every_struct_that_the_tree_holds_without_its_name_is_known() -> None:
    """The walk sees a bare struct only through its fields: one that means something by itself has to be named here."""
    known = {
        ("CallStmt", "funccall"): "FuncCall",
        ("PLAssignStmt", "val"): "SelectStmt",  # PL/pgSQL's own, never in SQL
        ("SelectStmt", "larg"): "SelectStmt",
        ("SelectStmt", "rarg"): "SelectStmt",
    }
    telling = {"FuncCall", "ColumnRef", "SelectStmt", "SubLink", "ResTarget", "A_Expr", "A_Indirection", "TypeCast"}
    found = {
        (name, slot): info.c_type.rstrip("*")
        for name, node in vars(ast).items()
        if isinstance(slots := getattr(node, "__slots__", None), dict)
        for slot, info in slots.items()
        if info.c_type.rstrip("*") in telling
    }
    assert found.items() <= known.items()


RELATIONS = {
    "SELECT * FROM a JOIN s.b ON true, LATERAL (SELECT * FROM c) x": ("a s.b c", ""),
    "SELECT (SELECT 1 FROM a), EXISTS (SELECT 1 FROM b), ARRAY(SELECT 1 FROM c) WHERE 1 IN (TABLE d)": ("a b c d", ""),
    "SELECT * FROM a UNION SELECT * FROM b EXCEPT (SELECT * FROM c)": ("a b c", ""),
    "SELECT 1 ORDER BY (SELECT 1 FROM a) LIMIT (SELECT 1 FROM b)": ("a b", ""),
    "SELECT count(*) FILTER (WHERE x IN (SELECT 1 FROM a)) OVER (ORDER BY (SELECT 1 FROM b)) FROM c": ("a b c", ""),
    "VALUES ((SELECT 1 FROM a))": ("a", ""),
    "SELECT * FROM f((SELECT 1 FROM a)) x": ("a", ""),
    "SELECT * FROM a TABLESAMPLE system ((SELECT 1 FROM b))": ("a b", ""),
    "SELECT JSON_ARRAY(SELECT 1 FROM a)": ("a", ""),
    "INSERT INTO a SELECT * FROM b": ("b", "a"),
    "INSERT INTO a VALUES (1) ON CONFLICT (x) DO UPDATE SET y = (SELECT 1 FROM b)": ("b", "a"),
    "INSERT INTO a VALUES (1) RETURNING x": ("a", "a"),
    "UPDATE a SET x = (SELECT 1 FROM b) FROM c WHERE y IN (SELECT 1 FROM d)": ("b c d", "a"),
    "UPDATE a SET (x, y) = (SELECT 1, 2 FROM b)": ("b", "a"),
    "DELETE FROM a USING b WHERE x IN (SELECT 1 FROM c)": ("b c", "a"),
    "MERGE INTO a USING b ON a.x = b.x WHEN NOT MATCHED THEN INSERT VALUES ((SELECT 1 FROM c))": ("b c", "a"),
    "COPY a TO STDOUT": ("a", ""),
    "COPY (SELECT * FROM a) TO STDOUT": ("a", ""),
    "COPY a FROM STDIN WHERE x > 1": ("", "a"),
    "SELECT * INTO b FROM a": ("a", "b"),
    "CREATE TABLE b AS SELECT * FROM a": ("a", "b"),
    "CREATE VIEW b AS SELECT * FROM a": ("a", "b"),
    "CREATE TABLE b (x int REFERENCES a, LIKE c) INHERITS (d)": ("", "a b c d"),
    "CREATE TEMP TABLE b (x int)": ("", "pg_temp.b"),
    "CREATE INDEX ON a (x) WHERE x > 1": ("", "a"),
    "CREATE RULE r AS ON INSERT TO a DO INSTEAD INSERT INTO b SELECT * FROM c": ("c", "a"),
    "CREATE FUNCTION f() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT x FROM a; END": ("a", ""),
    "CREATE POLICY p ON a USING (x IN (SELECT 1 FROM b))": ("b", "a"),
    "CREATE PUBLICATION p FOR TABLE a, b": ("", "a b"),
    "ALTER TABLE a ATTACH PARTITION b FOR VALUES IN (1)": ("", "a b"),
    "ALTER TABLE a RENAME COLUMN x TO y": ("", "a"),
    "DROP TABLE a, s.b": ("", "a s.b"),
    "DROP TRIGGER t ON s.a": ("", "s.a"),
    "COMMENT ON COLUMN s.a.x IS 'y'": ("", "s.a"),
    "GRANT SELECT ON a, b TO c": ("", "a b"),
    "TRUNCATE a, b": ("", "a b"),
    "LOCK a": ("", "a"),
    "VACUUM a (x), b": ("", "a b"),
    "EXPLAIN UPDATE a SET x = 1 FROM b": ("a b", ""),
    "DECLARE c CURSOR FOR SELECT * FROM a": ("a", ""),
    'SELECT * FROM "A", B, U&"\\0061"': ("A b a", ""),
    "SELECT * FROM db.s.a": ("s.a", ""),
    "SELECT * FROM ONLY a": ("a", ""),
    # WITH: a name hides only where it is in scope
    "WITH a AS (SELECT 1) SELECT * FROM a": ("", ""),
    "WITH a AS (SELECT * FROM a) SELECT * FROM a": ("a", ""),
    "WITH RECURSIVE a AS (SELECT 1 UNION SELECT * FROM a) SELECT * FROM a": ("", ""),
    "WITH a AS (SELECT 1) SELECT * FROM s.a": ("s.a", ""),
    "WITH a AS (SELECT * FROM b), b AS (SELECT * FROM a) SELECT * FROM b": ("b", ""),
    "WITH RECURSIVE a AS (SELECT * FROM b), b AS (SELECT 1) SELECT * FROM a": ("", ""),
    "SELECT * FROM (WITH a AS (SELECT 1) SELECT * FROM a) x, a": ("a", ""),
    "SELECT * FROM a, (WITH b AS (SELECT 1) SELECT 1 WHERE EXISTS (TABLE b)) x": ("a", ""),
    "WITH a AS (SELECT 1) INSERT INTO a SELECT * FROM a": ("", "a"),
    "WITH a AS (SELECT 1) SELECT 1 UNION SELECT * FROM a": ("", ""),
    "WITH x AS (DELETE FROM a RETURNING *) SELECT * FROM x": ("a", ""),
}


@pytest.mark.parametrize("sql", RELATIONS)
def test_relations_are_found_wherever_they_stand(sql: str) -> None:
    reads, writes = RELATIONS[sql]
    assert (names(one(sql).reads), names(one(sql).writes)) == (set(reads.split()), set(writes.split()))


def test_a_changing_with_query_is_a_kind_of_its_own() -> None:
    facts = one("WITH x AS (DELETE FROM a RETURNING *), y AS (UPDATE b SET z = 1 WHERE true) INSERT INTO c TABLE x")
    assert [(part.kind, names(part.writes), part.unguarded) for part in facts.parts] == [
        ("insert", {"c"}, False),
        ("delete", {"a"}, True),
        ("update", {"b"}, False),
    ]


def test_for_update_locks_what_is_read() -> None:
    facts = one("SELECT * FROM a JOIN s.b ON true FOR NO KEY UPDATE OF a")
    assert [(part.kind, names(part.writes)) for part in facts.also] == [("select-for-update", {"a", "s.b"})]


def test_prepare_holds_the_statement_that_it_prepares() -> None:
    assert kinds("PREPARE p AS DELETE FROM a") == ["prepare", "delete"]
    assert kinds("CREATE SCHEMA s CREATE VIEW v AS SELECT 1") == ["create-schema", "create-view"]


FUNCTIONS = {
    "SELECT f(g(x)), s.h()": "f g s.h",
    "SELECT pg_catalog.lower(x)": "pg_catalog.lower",
    "SELECT extract(year FROM x)": "pg_catalog.extract",
    "SELECT * FROM f(1), ROWS FROM (g(2), s.h(3))": "f g s.h",
    "SELECT * FROM a TABLESAMPLE m(1)": "m",
    "SELECT sum(x) FILTER (WHERE f(y)) OVER (PARTITION BY g(z)) FROM a": "sum f g",
    "SELECT 1 FROM a ORDER BY f(x) LIMIT g(1)": "f g",
    "INSERT INTO a VALUES (f(1)) ON CONFLICT DO UPDATE SET x = g(2) WHERE h(3)": "f g h",
    "UPDATE a SET x[f(1)] = g(2)": "f g",
    "CREATE TABLE a (x int DEFAULT f() CHECK (g(x)))": "f g",
    "CREATE TRIGGER t BEFORE INSERT ON a EXECUTE FUNCTION s.f()": "s.f",
    "ALTER TABLE a ALTER x SET DEFAULT f()": "f",
    "EXECUTE p(f(1))": "f",
    "CALL f(g(1))": "f g",
    "SELECT 1 OPERATOR(pg_catalog.+) 2, 1 + 2, x ~~ y, x LIKE y, x BETWEEN 1 AND 2, x IN (1)": "",
    "SELECT 1 OPERATOR(s.+) 2, x <%> y, 1 <%%> ANY (y), x <#%> ALL (SELECT 1) FROM a ORDER BY x USING <<%": (
        "s.+ <%> <%%> <#%> <<%"
    ),
    # a function may be called as if it were a column
    "SELECT x.pg_read_file FROM unnest(ARRAY['/etc/passwd']) x": "unnest pg_read_file",
    "SELECT ('/etc/passwd'::text).pg_read_file": "pg_read_file",
    "SELECT x.purge FROM generate_series(1, 2) x": "generate_series purge",
    "SELECT (1).purge": "purge",
    "SELECT x.x, x.v FROM f() AS x(v)": "f",
    "SELECT x.a FROM f() AS x(a int)": "f",
    "SELECT pg_options_to_table.option_name FROM pg_options_to_table('{}')": "pg_options_to_table",
    "SELECT a.email FROM a": "",
    # a quoted name cannot pass for a qualified one
    'SELECT "pg_catalog.lower"(x)': '"pg_catalog.lower"',
    # what does the work of another statement
    "SELECT set_config(x, 'y', false)": "set_config",
    "SELECT set_config('client_encoding', 'big5', false)": "set_config",
    "SELECT nextval(x)": "nextval",
    "SELECT nextval('no; name')": "nextval",
}


@pytest.mark.parametrize("sql", FUNCTIONS)
def test_functions_are_found_however_they_are_called(sql: str) -> None:
    assert one(sql).functions == set(FUNCTIONS[sql].split())


def test_functions_that_do_a_statements_work_count_as_that_statement() -> None:
    (part,) = one("SELECT set_config('Search_Path', 'x', true)").also
    assert (part.kind, part.parameter, part.value) == ("set", "search_path", "x")
    sequences = ["SELECT nextval('s')", "SELECT nextval('S.T'::regclass)", "INSERT INTO a VALUES (setval('\"S\"', 1))"]
    assert [(p.kind, names(p.writes)) for sql in sequences for p in one(sql).also] == [
        ("nextval", {"s"}),
        ("nextval", {"s.t"}),
        ("setval", {"S"}),
    ]


@pytest.mark.parametrize(
    ("sql", "parameter", "value"),
    [
        ("SET Application_Name TO 'x'", "application_name", "x"),
        ("SET NAMES 'latin1'", "client_encoding", "latin1"),
        ("SET TIME ZONE 'UTC'", "timezone", "UTC"),
        ("SET SESSION AUTHORIZATION x", "session_authorization", "x"),
        ("SET search_path = a, b", "search_path", "a, b"),
        ("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "transaction", ""),
        ("SET TRANSACTION SNAPSHOT 'x'", "transaction snapshot", ""),
        ("SHOW Server_Version", "server_version", ""),
        ("RESET Role", "role", ""),
    ],
)
def test_settings_are_named(sql: str, parameter: str, value: str) -> None:
    assert (one(sql).parameter, one(sql).value) == (parameter, value)


def test_an_update_without_where_is_unguarded() -> None:
    assert [one(sql).unguarded for sql in ("DELETE FROM a", "UPDATE a SET x = 1", "DELETE FROM a WHERE x")] == [
        True,
        True,
        False,
    ]


def test_every_statement_of_a_string_is_classified() -> None:
    assert [facts.kind for facts in classify("SELECT 1; /* ; */ DROP TABLE a;; COMMIT")] == [
        "select",
        "drop-table",
        "commit",
    ]
    assert classify("") == classify(" ; -- nothing\n") == ()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("SELEC 1", "grammar"),
        ("ALTER ROLE x PASSWORD 'geheim", "unterminated quoted string"),
        ("SELECT 1\0; DROP TABLE a", "NUL"),
        ("SELECT '\ud800'", "cannot be read"),
        ("SELECT " + "1+" * 2000 + "1", "nested"),
        ("SELECT " + "(" * 200_000, "grammar"),
        ("SELECT " + "NOT " * 3000 + "true", "nested"),
        ("SELECT 1 " + " UNION SELECT 1" * 5000, "nested"),
        ("SELECT '" + "x" * (1 << 20) + "'", "characters"),
        ("CREATE TABLE a AS EXECUTE p", "not seen"),
        ("EXPLAIN ANALYZE CREATE TABLE a AS EXECUTE p", "not seen"),
    ],
)
def test_what_cannot_be_classified_says_why_and_shows_nothing(text: str, why: str) -> None:
    with pytest.raises(Unclassified) as raised:
        classify(text)
    assert why in str(raised.value)
    assert "geheim" not in str(raised.value)


def test_an_unknown_node_is_unclassified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WALKED", module._WALKED - {"CaseExpr"})
    with pytest.raises(Unclassified, match="`CaseExpr`"):
        classify("SELECT CASE WHEN true THEN 1 END")


TOKENS = """SELECT FROM WHERE ( ) , ; * . a b 'x' " $1 $$ :: WITH AS UNION INSERT INTO VALUES UPDATE SET = DELETE
RETURNING JOIN USING ON NATURAL LATERAL ORDER BY GROUP 1 COPY TO STDOUT CREATE TABLE VIEW DO ROLE [ ] -- /* */"""
WORDS = st.sampled_from(TOKENS.split())


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(WORDS, max_size=25).map(" ".join)))
def test_no_text_raises_anything_but_unclassified(text: str) -> None:
    try:
        classify(text)
    except Unclassified as error:
        assert str(error)
