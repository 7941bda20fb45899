"""What clients do by themselves: the built-in class that is allowed unless a rule denies it.

Of SQL drivers, since denying it breaks every ORM:

- transactions: `begin`, `commit`, `rollback`, `savepoint`, `release`, `rollback-to`, `set-constraints`
- what was ruled on before: `execute`, `fetch`, `move`, `close`, `deallocate`, `discard`; `prepare` itself (its
  statement is ruled on); `unlisten`
- `set` and `reset` of the parameters below, `show` of any that is not secret
- a `select` that touches no relation, or only those of the system's catalog that hold nobody's data or secrets, and
  calls only safe built-in functions

Not in the class: settings that change what a name or a literal means (`search_path`, `standard_conforming_strings`),
who acts (`role`, `session_authorization`), or what is checked (`row_security`,
`session_replication_role`). Those no rule can allow.

Of Kubernetes clients: discovery (which resources there are, the API's description, version and health), and asking what
one may do oneself; the answer tells what the gateway's credential may.
"""

from __future__ import annotations

import re

from proxy.model import Relation, RequestFacts, StatementFacts
from proxy.policy import catalog

KINDS = frozenset(
    {
        *{"begin", "commit", "rollback", "savepoint", "release", "rollback-to", "set-constraints"},
        *{"prepare", "execute", "fetch", "move", "close", "deallocate", "discard", "unlisten"},
    }
)

PARAMETERS = frozenset(
    {
        *{"application_name", "client_min_messages", "extra_float_digits", "bytea_output", "xmloption", "xmlbinary"},
        *{"datestyle", "intervalstyle", "timezone", "timezone_abbreviations", "lc_messages", "lc_monetary"},
        *{"lc_numeric", "lc_time", "statement_timeout", "lock_timeout", "transaction_timeout"},
        *{"idle_in_transaction_session_timeout", "idle_session_timeout", "client_connection_check_interval"},
        *{"transaction", "session characteristics", "transaction_isolation", "transaction_read_only"},
        *{"transaction_deferrable", "default_transaction_isolation", "default_transaction_read_only"},
        *{"default_transaction_deferrable", "synchronous_commit", "jit", "cursor_tuple_fraction", "plan_cache_mode"},
        *{"random_page_cost", "seq_page_cost", "enable_seqscan", "enable_indexscan", "enable_indexonlyscan"},
        *{"enable_bitmapscan", "enable_hashjoin", "enable_mergejoin", "enable_nestloop", "enable_sort"},
    }
)
"""Settings that change how things look, how long they may take or how they are planned; never what they mean."""

ENCODINGS = frozenset({"utf8", "unicode", "sql_ascii", "sqlascii", "latin1", "iso88591", "auto", "default"})
"""Client encodings whose bytes below 0x80 are ASCII wherever they stand, without hyphens and case."""

SECRET_PARAMETERS = frozenset(
    {
        *{"primary_conninfo", "ssl_passphrase_command", "archive_command", "restore_command", "recovery_end_command"},
        *{"archive_cleanup_command", "hba_file", "ident_file", "krb_server_keyfile", "ssl_key_file", "all"},
    }
)

GUARDED_FIXED = frozenset(
    {
        *{"pg_authid", "pg_shadow", "pg_user_mapping", "pg_user_mappings", "pg_subscription", "pg_foreign_server"},
        *{"pg_foreign_data_wrapper", "pg_foreign_table", "pg_statistic", "pg_statistic_ext_data", "pg_stats"},
        *{"pg_stats_ext", "pg_stats_ext_exprs", "pg_hba_file_rules", "pg_ident_file_mappings", "pg_file_settings"},
        *{"pg_largeobject", "pg_stat_activity", "pg_stat_replication", "pg_stat_wal_receiver", "pg_stat_subscription"},
        *{"pg_db_role_setting", "pg_prepared_xacts", "pg_backend_memory_contexts", "pg_shmem_allocations", "pg_aios"},
    }
)
"""Relations of pg_catalog that hold secrets, samples of column values or other sessions' statements: only a rule that
names `pg_catalog` opens them."""

GUARDED_INFORMATION_SCHEMA = frozenset(
    {
        *{"user_mapping_options", "foreign_server_options", "foreign_table_options", "foreign_data_wrapper_options"},
        *{"_pg_user_mappings", "_pg_foreign_servers", "_pg_foreign_tables", "_pg_foreign_table_columns"},
        *{"_pg_foreign_data_wrappers", "column_options"},
    }
)


FIXED_PARAMETERS = frozenset(
    {
        *{"search_path", "role", "session_authorization", "standard_conforming_strings", "backslash_quote"},
        *{"row_security", "session_replication_role", "local_preload_libraries", "session_preload_libraries"},
        *{"dynamic_library_path", "transaction snapshot"},
    }
)
"""Settings that no rule can allow to change: the policy would judge something else than what is run."""


def is_fixed(parameter: str, value: str) -> bool:
    """Whether setting this is denied whatever the rules say."""
    return parameter in FIXED_PARAMETERS or (
        parameter == "client_encoding" and not is_harmless_setting(parameter, value)
    )


def is_harmless_setting(parameter: str, value: str) -> bool:
    """Whether `parameter` may be set to `value` without a rule; an empty value is the default."""
    if parameter in ("client_encoding", "names"):
        return value.lower().replace("-", "").replace("_", "") in {word.replace("_", "") for word in ENCODINGS | {""}}
    return parameter in PARAMETERS


def is_open_catalog(relation: Relation) -> bool:
    """Whether it is a relation of the system's catalog that anybody may read. An unqualified name is looked up in
    pg_catalog before any other schema."""
    if relation.schema == "information_schema":
        return relation.name in catalog.INFORMATION_SCHEMA and relation.name not in GUARDED_INFORMATION_SCHEMA
    return (
        relation.schema in ("", "pg_catalog")
        and relation.name in catalog.RELATIONS
        and relation.name not in GUARDED_FIXED
    )


def covers(facts: StatementFacts, kind: str, relation: Relation | None) -> bool:
    """Whether this part of a statement, whose functions are all safe, belongs to the class."""
    if kind in KINDS:
        return True
    match kind:
        case "select":
            return relation is None or is_open_catalog(relation)
        case "set":
            return is_harmless_setting(facts.parameter, facts.value)
        case "reset":
            return facts.parameter == "all" or is_harmless_setting(facts.parameter, "")
        case "show":
            return facts.parameter not in SECRET_PARAMETERS and "." not in facts.parameter
        case _:
            return False


_DISCOVERY = re.compile(
    r"/(api(/[^/]+)?|apis(/[^/]+){0,2}|openapi/v[23](/.+)?|version|(healthz|livez|readyz)(/[^/]+)*)/?"
)
_SELF_REVIEWS = frozenset(
    {
        ("authorization.k8s.io", "selfsubjectaccessreviews"),
        ("authorization.k8s.io", "selfsubjectrulesreviews"),
        ("authentication.k8s.io", "selfsubjectreviews"),
    }
)


def covers_request(facts: RequestFacts) -> bool:
    """Whether a request to an API server belongs to the class."""
    if not facts.resource:
        return facts.verb in ("get", "head") and _DISCOVERY.fullmatch(facts.path) is not None
    return facts.verb == "create" and not facts.subresource and (facts.group, facts.resource) in _SELF_REVIEWS
