"""Takes secrets out of what is written down of a request: values of Secrets, of environment variables, of fields and
words whose names say that they hold one.

It is for recordings and previews, and generous: what looks like a secret is left out. It never changes what is sent.

Blind spot: a secret under an ordinary name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SCRUBBED = "***"
MAX_DEPTH = 64

_TELLING = re.compile(
    r"pass(word|wd|phrase)?$|secret|token|credential|private[-_]?key|api[-_]?key|\.dockerconfigjson", re.I
)
_IN_URL = r"(://[^/\s:@]{0,64}+:)[^@/\s]{1,2048}+(?=@)"
"""No slash in the password, so that nothing is looked at twice: a body of megabytes may be full of these."""
_TELLING_WORD = re.compile(
    rf"(?i)((?:pass(?:word|wd)?|secret|token|credential|api[-_]?key)[^=:\s]{{0,64}}+[=:])\S+|{_IN_URL}"
)
_TELLING_OPTION = re.compile(r"--?[\w-]{0,64}?(?:pass(?:word|wd)?|secret|token|credentials?|api[-_]?key)", re.I)
_TELLING_URL = re.compile(_IN_URL)
_QUOTED = re.compile(
    r"((?:Invalid|Duplicate|Unsupported) value: )"
    r'("(?:[^"\\]|\\.)*+(?:"|$)|[\w.+-]{0,64}+(?=: |, |\]|$)|.*)|( error found in #).*',
    re.DOTALL,
)
"""What an API server quotes in a refusal: a field's value, or the whole object where a patch does not fit it; older
ones, a piece of the body that is no JSON."""
_NAMES_ONLY = re.compile(
    r'secrets "[^"\n]*" (?:not found|already exists|is forbidden: .*)'
    r'|Operation cannot be fulfilled on secrets "[^"\n]*": .*'
)
_WHOLE = {"secrets": ("data", "stringData"), "configmaps": ("binaryData",)}
_WORDS = frozenset({"args", "command"})
"""Fields that hold the words of a command."""
_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def scrubbed(resource: str, body: object) -> object:
    """A copy of the decoded body of a request on this resource, with secrets taken out."""
    return _scrub(body, _WHOLE.get(resource, ()), 0)


def scrubbed_words(words: Sequence[str]) -> str:
    """A command in one line, with what looks like a secret taken out."""
    return _TELLING_WORD.sub(lambda match: f"{match[1] or match[2]}{SCRUBBED}", " ".join(words))


def scrubbed_message(resource: str, message: str) -> str:
    """What a server said of a request on this resource, without the values that it quotes. Of a Secret's only what
    is known to quote none."""
    if resource == "secrets" and not _NAMES_ONLY.fullmatch(message):
        return ""
    return scrubbed_words([_QUOTED.sub(lambda match: f"{match[1] or match[3]}{SCRUBBED}", message)])


def _scrub(value: object, whole: tuple[str, ...], depth: int) -> object:
    if depth > MAX_DEPTH:
        return SCRUBBED
    match value:
        case dict():
            environment = "name" in value and "value" in value
            return {
                key: (
                    _emptied(inner)
                    if key in whole or key == _APPLIED or (environment and key == "value") or _tells(key, inner)
                    else _scrub_words(inner)
                    if key.rpartition("/")[2] in _WORDS and isinstance(inner, list)
                    else _scrub(inner, whole if depth == 0 else (), depth + 1)
                )
                for key, inner in value.items()
            }
        case list():
            return [_scrub_operation(inner, whole, depth) for inner in value]
        case str() if "://" in value:
            return _TELLING_URL.sub(rf"\1{SCRUBBED}", value)
        case _:
            return value


def _scrub_words(words: list[object]) -> list[object]:
    """The words of a command; behind one that says that it takes a secret, the next one too."""
    return [
        (SCRUBBED if isinstance(before, str) and _TELLING_OPTION.fullmatch(before) else scrubbed_words([word]))
        if isinstance(word, str)
        else _emptied(word)
        for before, word in zip(("", *words), words, strict=False)
    ]


def _scrub_operation(value: object, whole: tuple[str, ...], depth: int) -> object:
    """An element of a list; of a JSON patch the value goes by the path that it is put at."""
    if isinstance(value, dict) and isinstance(value.get("path"), str) and "op" in value and "value" in value:
        if value["path"] in ("", "/"):
            return {**value, "value": _scrub(value["value"], whole, depth)}
        steps = value["path"].split("/")
        if any(step in whole or _TELLING.search(step) for step in steps) or "env" in steps or "annotations" in steps:
            return {**value, "value": _emptied(value["value"])}
        if not _WORDS.isdisjoint(steps):
            words = value["value"]
            return {**value, "value": _scrub_words(words if isinstance(words, list) else [words])}
    return _scrub(value, whole, depth + 1)


def _tells(key: str, value: object) -> bool:
    return isinstance(value, str) and _TELLING.search(key) is not None


def _emptied(value: object) -> object:
    """Names stay, values go."""
    match value:
        case dict():
            return dict.fromkeys(value, SCRUBBED)
        case None:
            return None
        case _:
            return SCRUBBED
