"""Takes secrets out of SQL before it is written down or shown: `recordable`.

Secrets are string literals that
- follow a word that names a secret (`PASSWORD '…'`, `password = '…'`, `set_config('app.token', '…')`),
- follow `CONNECTION` (subscriptions), stand inside `OPTIONS (…)` (foreign servers, user mappings) or inside the
  parentheses of a `dblink…` call,
- look like a connection string with a password, or hold SQL that names one (bodies of DO and of functions).

Other literals stay as they are: what is written of those is for the rule's record level to say. Text that PostgreSQL's
scanner refuses is cut at its first quote, since nobody can tell where a literal in it ends.

Blind spots: a secret as a value like any other (`INSERT INTO users VALUES ('…')`), or in a comment; a server with
`standard_conforming_strings` off may end a literal elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pglast.parser import ParseError, Token, scan

SECRET = "<secret>"

MAX_CHARACTERS = 1 << 20
"""Length of a text that is scanned; of a longer one that could hold a secret only the start up to its first quote is
kept."""

_LITERALS = frozenset({"SCONST", "USCONST", "BCONST", "XCONST"})
_COMMENTS = frozenset({"SQL_COMMENT", "C_COMMENT"})
# Between a word and the value it is given: = := => , ( TO
_JOINTS = frozenset({"ASCII_61", "COLON_EQUALS", "EQUALS_GREATER", "ASCII_44", "TO"})

_SECRET_WORD = re.compile(r"passw(or)?d|passphrase|secret|token|api_?key|private_?key|credential", re.IGNORECASE)
_CONNECTION_STRING = re.compile(r"://[^/\s@]*:[^/\s@]*@")
_SUSPECT = re.compile(
    rf"{_SECRET_WORD.pattern}|connection|options|dblink|u&|{_CONNECTION_STRING.pattern}", re.IGNORECASE
)
_QUOTE = re.compile(r"'|\$(?=[A-Za-z_\x80-\U0010ffff$])")


def recordable(text: str) -> str:
    """The text with every secret literal replaced by `<secret>`. Never raises."""
    if not _SUSPECT.search(text):
        return text
    if "\0" in text or len(text) > MAX_CHARACTERS:
        return _cut(text)
    try:
        tokens = [token for token in scan(text) if token.name not in _COMMENTS]
    except (ParseError, UnicodeError, ValueError):
        return _cut(text)
    pieces: list[str] = []
    end = 0
    for token in _secrets(text, tokens):
        pieces += (text[end : token.start], SECRET)
        end = token.end + 1
    return "".join((*pieces, text[end:]))


def _cut(text: str) -> str:
    quote = _QUOTE.search(text)
    return text if quote is None else f"{text[: quote.start()]}{SECRET}"


def _secrets(text: str, tokens: list[Token]) -> Iterator[Token]:
    """The literals to take out, in order."""
    armed = False
    depth = 0
    opened: list[int] = []
    previous = ""
    for token in tokens:
        spelled = text[token.start : token.end + 1]
        if token.name in _LITERALS:
            if armed or opened or _holds_secret(spelled) or token.name == "USCONST":
                yield token
            armed = bool(_SECRET_WORD.search(spelled))
        elif token.name == "ASCII_40":
            depth += 1
            if previous == "options" or previous.startswith(("dblink", '"dblink')):
                opened.append(depth)
        elif token.name == "ASCII_41":
            if opened and opened[-1] == depth:
                opened.pop()
            depth -= 1
            armed = False
        elif token.name not in _JOINTS:
            armed = token.name == "CONNECTION" or (
                (token.name == "IDENT" or token.kind != "NO_KEYWORD") and bool(_SECRET_WORD.search(spelled))
            )
        previous = spelled.lower()


def _holds_secret(literal: str) -> bool:
    """Whether a literal is a connection string with a password, or SQL or code that gives one."""
    if _CONNECTION_STRING.search(literal):
        return True
    found = _SECRET_WORD.search(literal)
    return found is not None and bool(re.search(r"['=]", literal[found.end() : -1]))
