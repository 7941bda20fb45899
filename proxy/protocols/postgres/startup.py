"""What a client may ask for in its StartupMessage: which parameters go on to the server, and which are refused.

Blind spot: only names are judged, except for `client_encoding`; a bad value is for the server to refuse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from proxy.protocols.postgres.messages import read_startup

SAFE_PARAMETERS = frozenset(
    {
        "application_name",
        "bytea_output",
        "client_encoding",
        "client_min_messages",
        "datestyle",
        "default_transaction_deferrable",
        "default_transaction_isolation",
        "default_transaction_read_only",
        "extra_float_digits",
        "geqo",
        "idle_in_transaction_session_timeout",
        "intervalstyle",
        "jit",
        "lc_monetary",
        "lc_numeric",
        "lc_time",
        "lock_timeout",
        "plan_cache_mode",
        "statement_timeout",
        "tcp_keepalives_count",
        "tcp_keepalives_idle",
        "tcp_keepalives_interval",
        "tcp_user_timeout",
        "timezone",
    }
)
"""Settings that change how results look or how long they take, and never what a name or a text means."""

MAX_SHOWN = 64
"""Characters of a refused name or value that are quoted back."""

ENCODINGS = {"utf8": "utf-8", "unicode": "utf-8", "sqlascii": "utf-8", "latin1": "latin-1", "iso88591": "latin-1"}
"""Client encodings in which a byte below 0x80 always is that ASCII character, by PostgreSQL's normalised name, with
the codec for the rest. SQL_ASCII text is what the server stores, so it is read as UTF-8 or not at all."""


class StartupRefused(Exception):
    """The gateway does not start such a session. `code` is the SQLSTATE; the message is for the client."""

    def __init__(self, message: str, hint: str = "", code: str = "28000") -> None:
        super().__init__(message)
        self.hint = hint
        self.code = code


@dataclass(frozen=True, slots=True)
class StartupRequest:
    """`settings` go on to the server; `parameters` are all that the client sent except user and database, for the
    recording; `unknown_options` are `_pq_.` options."""

    user: str
    database: str
    settings: tuple[tuple[str, str], ...]
    parameters: tuple[tuple[str, str], ...]
    unknown_options: tuple[bytes, ...]


def encoding_codec(name: str) -> str | None:
    """The codec for a client encoding as PostgreSQL would understand its name, or None where it is not supported."""
    return ENCODINGS.get(re.sub(r"[^a-z0-9]", "", name.lower()))


def read_request(body: bytes) -> StartupRequest:
    """Reads and judges a StartupMessage behind its version. Raises `Malformed` and `StartupRefused`."""
    pairs: list[tuple[str, str]] = []
    unknown: list[bytes] = []
    for raw, raw_value in read_startup(body):
        if raw.startswith(b"_pq_."):
            unknown.append(raw)
            continue
        try:
            pairs.append((raw.decode(), raw_value.decode()))
        except UnicodeDecodeError:
            raise StartupRefused("a start-up parameter is not UTF-8", code="08P01") from None
    given = dict(pairs)
    user = given.pop("user", "")
    database = given.pop("database", "") or user
    if not user:
        raise StartupRefused("no PostgreSQL user name specified in startup packet")
    settings: dict[str, str] = {}
    for name, value in _split_options(given.get("options", "")):
        settings[_judge(name, value)] = value
    for name, value in given.items():
        if name != "options":
            settings[_judge(name, value)] = value
    return StartupRequest(user, database, tuple(settings.items()), tuple(given.items()), tuple(unknown))


def _judge(name: str, value: str) -> str:
    lowered = name.lower()
    if lowered == "replication":
        raise StartupRefused("replication connections do not pass the gateway", "connect without `replication`")
    if lowered not in SAFE_PARAMETERS:
        raise StartupRefused(
            f"the start-up parameter `{name[:MAX_SHOWN]}` does not pass the gateway",
            "leave it out, or use SET after connecting if the policy allows that",
        )
    if lowered == "client_encoding" and encoding_codec(value) is None:
        raise StartupRefused(
            f"client encoding `{value[:MAX_SHOWN]}` does not pass the gateway", "use UTF8, LATIN1 or SQL_ASCII", "0A000"
        )
    return lowered


def _split_options(options: str) -> list[tuple[str, str]]:
    """The settings in an `options` string (`-c name=value`, `--name=value`), split as the server does
    (pg_split_opts)."""
    escaped = re.findall(r"(?:\\.|[^\\\s])+", options, flags=re.S)
    words = [re.sub(r"\\(.?)", r"\1", word, flags=re.S) for word in escaped]
    settings: list[tuple[str, str]] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "-c" and position < len(words):
            assignment = words[position]
            position += 1
        elif word.startswith("--") or (word.startswith("-c") and len(word) > 2):
            assignment = word[2:]
        else:
            shown = word[:MAX_SHOWN]
            raise StartupRefused(f"the option `{shown}` does not pass the gateway", "only `-c name=value` does")
        name, equals, value = assignment.partition("=")
        if not equals:
            raise StartupRefused(f"the option `{assignment[:MAX_SHOWN]}` has no value", "write `-c name=value`")
        settings.append((name.replace("-", "_"), value))
    return settings
