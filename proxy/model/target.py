"""What is protected: a database or API server, where it is, and how the gateway speaks to it."""

from __future__ import annotations

import enum

import msgspec


class TlsMode(enum.StrEnum):
    """libpq's `sslmode` values, with libpq's meaning (PostgreSQL manual, "SSL Support")."""

    DISABLE = "disable"
    ALLOW = "allow"
    PREFER = "prefer"
    REQUIRE = "require"
    VERIFY_CA = "verify-ca"
    VERIFY_FULL = "verify-full"


class Endpoint(msgspec.Struct, frozen=True, order=True):
    """A numeric address (IPv4, or IPv6 never v4-mapped) and a TCP port."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class Target(msgspec.Struct, frozen=True):
    """A target as the data path needs it. `server_name` is the name that `verify-full` checks and that the gateway's
    own certificate for this target carries; `ca_pem` holds the trusted roots, empty for the system's store.
    `credential` names an entry of the host agent's credential source. `databases` empty means any.
    """

    name: str
    protocol: str
    endpoints: tuple[Endpoint, ...]
    tls_mode: TlsMode
    server_name: str
    ca_pem: str
    credential: str
    databases: tuple[str, ...] = ()
