"""Takes secrets out of argument vectors before they are written down: a recording names who asked, and holds no secret.

What is looked for: the password of a connection URI, `password=…` and its like in any argument (libpq's key words,
environment assignments, `--token=…`), and the argument that follows an option of such a name. Matching of agents sees
the arguments as they are.

Blind spot: a secret under a name that says nothing.
"""

from __future__ import annotations

import re

import msgspec

from proxy.model import Chain, ProcessImage

SECRET = "<secret>"

_NAMES = r"(?:pass(?:word|wd|phrase)?|pgpassword|pwd|secret|token|api[-_]?key|credential)s?"
_URI = re.compile(r"(?<=://)([^/?#\s:@]*):[^/?#\s@]+@")
_ASSIGNMENT = re.compile(rf"(?i)\b([\w-]*{_NAMES}['\"]?\s*[=:]\s*)('[^']*'|\"[^\"]*\"|[^\s&;,'\"]+)")
_OPTION = re.compile(rf"(?i)--?[\w-]*{_NAMES}")


def recordable(chain: Chain) -> Chain:
    """The same chain with the secrets in its arguments replaced."""
    return msgspec.structs.replace(chain, lineage=tuple(map(_recordable_image, chain.lineage)))


def _recordable_image(image: ProcessImage) -> ProcessImage:
    argv = recordable_arguments(image.argv)
    return image if argv == image.argv else msgspec.structs.replace(image, argv=argv)


def recordable_arguments(argv: tuple[str, ...]) -> tuple[str, ...]:
    """An argument vector without what looks like a secret."""
    kept: list[str] = []
    secret_follows = False
    for argument in argv:
        kept.append(SECRET if secret_follows else _recordable_argument(argument))
        secret_follows = _OPTION.fullmatch(argument) is not None
    return tuple(kept)


def _recordable_argument(argument: str) -> str:
    return _ASSIGNMENT.sub(rf"\1{SECRET}", _URI.sub(rf"\1:{SECRET}@", argument))
