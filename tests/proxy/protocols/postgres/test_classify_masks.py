"""How a masked value could leave: every form of it is exposed or opaque, and plain use is neither.

The masked column is `customers.email`; each statement is judged by what the policy goes by: is `email` among the
exposed columns, or is anything opaque.
"""

from __future__ import annotations

import pytest

from proxy.model import StatementFacts
from proxy.protocols.postgres.classify import classify


def leaks(sql: str) -> bool:
    (facts,) = classify(sql)
    return any("email" in part.exposed_columns or part.opaque for part in facts.parts)


def facts(sql: str) -> StatementFacts:
    (only,) = classify(sql)
    return only


TRACED = """
SELECT email FROM customers
SELECT c.email, c.* FROM public.customers c WHERE c.id = 1 ORDER BY c.name
SELECT * FROM customers
TABLE customers
SELECT email AS e, "email" AS "E" FROM customers ORDER BY id
SELECT customers.email, public.customers.email FROM public.customers
SELECT s.email FROM (SELECT * FROM customers) s
SELECT z FROM (SELECT email AS z FROM customers) s
SELECT s.* FROM customers c, LATERAL (SELECT c.email AS v, c.id) s
WITH s AS (SELECT email, id FROM customers) SELECT email FROM s WHERE id = 1
WITH s AS MATERIALIZED (TABLE customers) SELECT * FROM s
SELECT c.email, o.total FROM customers c JOIN orders o ON o.customer = c.id
SELECT c.* FROM customers c LEFT JOIN orders o USING (id)
SELECT count(*) FROM customers
SELECT count(*) FROM customers GROUP BY name HAVING count(*) > 1
SELECT email, id FROM customers ORDER BY 2 DESC
SELECT DISTINCT id, name FROM customers
SELECT DISTINCT ON (id) email FROM customers
SELECT name, row_number() OVER (PARTITION BY name ORDER BY id) FROM customers
SELECT id FROM customers UNION SELECT id FROM orders
SELECT 1 FROM orders WHERE EXISTS (SELECT * FROM customers c WHERE c.id = orders.customer)
SELECT * FROM orders WHERE customer IN (SELECT id FROM customers WHERE name = 'x')
SELECT (SELECT name FROM customers LIMIT 1)
SELECT g, id FROM generate_series(1, 3) g, customers
SELECT email FROM customers LIMIT 10 OFFSET 5
SELECT email FROM customers FOR UPDATE
INSERT INTO customers (id, email) VALUES (1, 'x')
INSERT INTO customers VALUES (1, 'x') RETURNING *
INSERT INTO customers (id) SELECT id FROM customers
INSERT INTO customers VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET email = 'y'
UPDATE customers SET email = 'x' WHERE id = 1 RETURNING id, email
UPDATE customers c SET name = upper(name) RETURNING c.*
DELETE FROM customers WHERE id = 1 RETURNING email AS gone
WITH gone AS (DELETE FROM customers RETURNING *) SELECT email FROM gone
CREATE TABLE copy AS SELECT id, name FROM customers
CREATE VIEW v AS SELECT id FROM customers
COPY customers (id, name) TO STDOUT
COPY (SELECT id FROM customers) TO STDOUT
COPY customers FROM STDIN
DECLARE c CURSOR FOR SELECT email FROM customers
PREPARE p AS SELECT email FROM customers WHERE id = $1
TRUNCATE customers
DROP TABLE customers
"""

ESCAPES = """
SELECT lower(email) FROM customers
SELECT email || '' FROM customers
SELECT email::text FROM customers
SELECT email COLLATE "C" FROM customers
SELECT coalesce(email, '') FROM customers
SELECT CASE WHEN true THEN email END FROM customers
SELECT greatest(email, name) FROM customers
SELECT nullif(email, '') FROM customers
SELECT ARRAY[email] FROM customers
SELECT ROW(email) FROM customers
SELECT email[1] FROM customers
SELECT U&"em\\0061il" || '' FROM customers
SELECT EMAIL || '' FROM customers
SELECT c."email" || '' FROM customers c
SELECT max(email) FROM customers
SELECT string_agg(email, ',') FROM customers
SELECT count(*) FILTER (WHERE email > 'm') FROM customers
SELECT first_value(email) OVER (ORDER BY id) FROM customers
SELECT count(*) OVER (PARTITION BY email) FROM customers
SELECT count(*) OVER w FROM customers WINDOW w AS (ORDER BY email)
SELECT id FROM customers WHERE email LIKE 'a%'
SELECT id FROM customers WHERE email IN ('a', 'b')
SELECT id FROM customers WHERE email IS NOT NULL
SELECT id FROM customers WHERE (id, email) > (1, 'a')
SELECT id FROM customers WHERE email BETWEEN 'a' AND 'b'
SELECT id FROM customers WHERE 'x' = ANY (ARRAY[email])
SELECT id FROM customers ORDER BY email
SELECT id FROM customers ORDER BY email USING <
SELECT email FROM customers ORDER BY 1
SELECT id, email FROM customers ORDER BY 2
SELECT email AS e FROM customers ORDER BY e
SELECT email AS id, id AS x FROM customers ORDER BY id
SELECT * FROM customers ORDER BY 3
SELECT email FROM customers GROUP BY email
SELECT email FROM customers GROUP BY 1
SELECT email AS e FROM customers GROUP BY e
SELECT email FROM customers GROUP BY ROLLUP (1)
SELECT email FROM customers GROUP BY GROUPING SETS ((1), ())
SELECT name FROM customers GROUP BY name HAVING max(email) > 'a'
SELECT DISTINCT email FROM customers
SELECT DISTINCT * FROM customers
SELECT DISTINCT ON (email) id FROM customers
SELECT DISTINCT ON (2) id, email FROM customers
SELECT c FROM customers c
SELECT customers FROM customers
SELECT s FROM (SELECT * FROM customers) s
WITH s AS (TABLE customers) SELECT s FROM s
SELECT j FROM (customers JOIN orders USING (id)) j
SELECT j FROM customers JOIN orders USING (id) AS j
SELECT c.*::text FROM customers c
SELECT (c).email FROM customers c
SELECT (c.*).email FROM customers c
SELECT ((SELECT c FROM customers c)).email
SELECT row_to_json(c) FROM customers c
SELECT row_to_json(c.*) FROM customers c
SELECT to_jsonb(customers) FROM customers
SELECT email(c) FROM customers c
SELECT c.row_to_json FROM customers c
SELECT c.to_json FROM customers c
SELECT s.concat FROM (SELECT * FROM customers) s
SELECT count(c) FROM customers c
SELECT ROW(c.*) FROM customers c
SELECT id FROM customers c WHERE c IS NOT NULL
SELECT id FROM customers c ORDER BY c
SELECT z FROM (SELECT email AS z FROM customers) s WHERE z LIKE 'a%'
SELECT lower(z) FROM (SELECT email AS z FROM customers) s
SELECT y FROM (SELECT z AS y FROM (SELECT email AS z FROM customers) s) t ORDER BY y
WITH s AS (SELECT email AS z FROM customers) SELECT max(z) FROM s
WITH s(a, b) AS (SELECT * FROM customers) SELECT b FROM s WHERE b > 'a'
SELECT b FROM customers AS c(a, b) WHERE b > 'a'
SELECT b FROM (SELECT * FROM customers) AS s(a, b) WHERE b > 'a'
SELECT b FROM (customers CROSS JOIN orders) AS j(a, b) WHERE b > 'a'
SELECT * FROM customers NATURAL JOIN guesses
SELECT * FROM customers JOIN guesses USING (email)
SELECT * FROM customers c JOIN guesses g ON g.word = c.email
SELECT email FROM customers UNION ALL SELECT 'x'
SELECT * FROM customers UNION ALL SELECT 1, 'x'
TABLE customers UNION ALL VALUES (1, 'x')
(SELECT email FROM customers) EXCEPT SELECT 'x'
SELECT s.* FROM (SELECT email FROM customers UNION ALL SELECT 'x') s
WITH RECURSIVE s AS (SELECT email FROM customers UNION SELECT * FROM s) SELECT * FROM s
SELECT (SELECT email FROM customers LIMIT 1)
SELECT ARRAY(SELECT email FROM customers)
SELECT 'a' IN (SELECT email FROM customers)
SELECT 'a' IN (TABLE customers)
SELECT 1 WHERE EXISTS (SELECT 1 FROM customers WHERE email > 'm')
SELECT v.* FROM customers c, LATERAL (VALUES (c.email)) v
SELECT x.* FROM customers c, LATERAL unnest(ARRAY[c.email]) x
SELECT x.* FROM customers c, json_populate_record(NULL::customers, row_to_json(c)) x
SELECT x.* FROM customers c, XMLTABLE('/a' PASSING c.email COLUMNS y text) x
SELECT x.* FROM customers c, JSON_TABLE(c.email, '$' COLUMNS (y text PATH '$')) x
SELECT JSON_OBJECT('a': email) FROM customers
SELECT JSON_ARRAY(SELECT email FROM customers)
SELECT JSON_ARRAYAGG(email) FROM customers
SELECT xmlelement(name a, email) FROM customers
SELECT xmlforest(email) FROM customers
VALUES ((SELECT email FROM customers LIMIT 1))
SELECT 1 FROM customers LIMIT (SELECT length(email) FROM customers LIMIT 1)
INSERT INTO notes SELECT email FROM customers
INSERT INTO notes SELECT * FROM customers
INSERT INTO notes TABLE customers
INSERT INTO notes SELECT z FROM (SELECT email AS z FROM customers) s
INSERT INTO notes VALUES ((SELECT email FROM customers))
INSERT INTO customers VALUES (1, 'x') ON CONFLICT (email) DO NOTHING
INSERT INTO customers VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET name = customers.email
INSERT INTO customers VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET name = 'y' WHERE customers.email > 'm'
INSERT INTO customers VALUES (1, 'x') ON CONFLICT (id) WHERE email > 'm' DO NOTHING
UPDATE customers SET name = email
UPDATE customers SET name = 'x' WHERE email = 'y'
UPDATE notes SET text = c.email FROM customers c
UPDATE notes SET (text) = (SELECT email FROM customers)
UPDATE notes SET (a, b) = ROW(c.*) FROM customers c
UPDATE customers SET name = 'x' RETURNING lower(email)
UPDATE customers c SET name = 'x' RETURNING c
UPDATE customers SET name = 'x' RETURNING old.email
UPDATE customers SET name = 'x' RETURNING WITH (OLD AS o) o.*
DELETE FROM customers WHERE email = 'x'
DELETE FROM notes USING customers c WHERE c.email = notes.text
WITH gone AS (DELETE FROM customers RETURNING email AS z) SELECT lower(z) FROM gone
WITH gone AS (DELETE FROM customers RETURNING email) INSERT INTO notes SELECT * FROM gone
MERGE INTO notes n USING customers c ON n.id = c.id WHEN NOT MATCHED THEN INSERT VALUES (c.email)
MERGE INTO notes n USING customers c ON n.text = c.email WHEN MATCHED THEN DELETE
MERGE INTO notes n USING customers c ON n.id = c.id WHEN MATCHED AND c.email > 'm' THEN DELETE
SELECT email INTO notes FROM customers
SELECT * INTO notes FROM customers
CREATE TABLE notes AS SELECT * FROM customers
CREATE TABLE notes AS TABLE customers
CREATE TABLE notes(a, b) AS SELECT id, email FROM customers
CREATE MATERIALIZED VIEW v AS SELECT email FROM customers
CREATE VIEW v AS SELECT email FROM customers
CREATE VIEW v AS SELECT * FROM customers
CREATE VIEW v(a, b) AS SELECT id, email FROM customers
CREATE RULE r AS ON INSERT TO notes DO INSERT INTO notes SELECT email FROM customers
COPY customers TO STDOUT
COPY customers (email) TO STDOUT
COPY (SELECT email FROM customers) TO STDOUT
COPY (TABLE customers) TO STDOUT
COPY customers FROM STDIN WHERE email > 'm'
DECLARE c BINARY CURSOR FOR SELECT email FROM customers
DECLARE c CURSOR FOR SELECT lower(email) FROM customers
PREPARE p AS SELECT id FROM customers WHERE email = $1
EXPLAIN SELECT id FROM customers WHERE email = 'x'
EXPLAIN ANALYZE SELECT id FROM customers WHERE email = 'x'
WITH RECURSIVE s AS (SELECT 1 UNION SELECT 1) SEARCH DEPTH FIRST BY email SET o SELECT * FROM s, customers
"""


@pytest.mark.parametrize("sql", TRACED.strip().splitlines())
def test_what_row_description_traces_is_not_exposed(sql: str) -> None:
    assert not leaks(sql)


@pytest.mark.parametrize("sql", ESCAPES.strip().splitlines())
def test_what_nothing_traces_is_exposed_or_opaque(sql: str) -> None:
    assert leaks(sql)


def test_output_columns_are_those_of_the_outermost_query() -> None:
    assert facts("SELECT a, t.b AS x, f(c) FROM (SELECT d FROM t) t").output_columns == {"a", "b"}


def test_an_opaque_construct_is_named_in_words() -> None:
    assert facts("SELECT c FROM customers c").opaque == ("the whole row `c`",)
    assert facts("SELECT * FROM a NATURAL JOIN b").opaque == ("NATURAL JOIN",)
