"""The words that a rule may use for statements: every kind that the PostgreSQL classifier gives, and groups of them.

A kind is what a statement *does*, not how it is spelled: `TABLE x` is a `select`, `EXPLAIN ANALYZE DELETE …` is a
`delete`. The classifier's own table and this one are kept apart by the import contract and joined by a test.
"""

from __future__ import annotations

import fnmatch

# fmt: off
_OBJECTS = (
    "access-method", "aggregate", "cast", "collation", "conversion", "database", "default-privileges", "domain",
    "event-trigger", "extension", "foreign-data-wrapper", "foreign-table", "function", "index", "language",
    "materialized-view", "operator", "operator-class", "operator-family", "policy", "procedure", "publication", "role",
    "rule", "schema", "sequence", "server", "statistics", "subscription", "table", "tablespace", "text-search",
    "transform", "trigger", "type", "user-mapping", "view",
)
# fmt: on

READ = frozenset({"select", "copy-out"})
WRITE = frozenset(
    {"insert", "update", "delete", "merge", "copy-in", "truncate", "select-for-update", "nextval", "setval"}
)
TRANSACTION = frozenset({"begin", "commit", "rollback", "savepoint", "release", "rollback-to", "set-constraints"})
TWO_PHASE = frozenset({"prepare-transaction", "commit-prepared", "rollback-prepared"})
SESSION = frozenset(
    {
        *{"set", "reset", "show", "discard", "prepare", "execute", "deallocate", "fetch", "move", "close"},
        *{"listen", "unlisten", "notify", "lock-table", "load"},
    }
)
DDL = frozenset(f"{verb}-{noun}" for verb in ("create", "alter", "drop") for noun in _OBJECTS) | {
    *{"create-table-as", "select-into", "comment", "security-label", "import-foreign-schema", "alter-large-object"},
}
DCL = frozenset({"grant", "revoke", "grant-role", "revoke-role", "reassign-owned", "drop-owned"})
CODE = frozenset({"do", "call"})
MAINTENANCE = frozenset({"vacuum", "analyze", "reindex", "cluster", "checkpoint", "refresh-materialized-view"})
SYSTEM = frozenset({"alter-system", "copy-program", "copy-file"})

KINDS = READ | WRITE | TRANSACTION | TWO_PHASE | SESSION | DDL | DCL | CODE | MAINTENANCE | SYSTEM
"""Every statement kind."""

GROUPS = {
    "read": READ,
    "write": WRITE,
    "ddl": DDL,
    "dcl": DCL,
    "code": CODE,
    "maintenance": MAINTENANCE,
    "transaction": TRANSACTION | TWO_PHASE,
    "session": SESSION,
    "system": SYSTEM,
    "*": KINDS,
}
"""Names that stand for several kinds."""


def expand(word: str) -> frozenset[str]:
    """The kinds that one word of a rule means: a kind, a group, or a glob such as `drop-*`. Empty when it means
    none."""
    if word in GROUPS:
        return GROUPS[word]
    if word in KINDS:
        return frozenset({word})
    return frozenset(fnmatch.filter(KINDS, word)) if "*" in word else frozenset()
