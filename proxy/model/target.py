"""What is protected: a database or API server, where it is, and how the gateway speaks to it."""

from __future__ import annotations

import enum
import ipaddress

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


class Prefix(msgspec.Struct, frozen=True, order=True):
    """All addresses of a network (`10.20.0.0/16`; never v4-mapped) at one TCP port."""

    network: str
    port: int

    def __contains__(self, endpoint: Endpoint) -> bool:
        network = ipaddress.ip_network(self.network)
        address = ipaddress.ip_address(endpoint.address)
        return endpoint.port == self.port and address.version == network.version and address in network

    def __str__(self) -> str:
        return f"[{self.network}]:{self.port}" if ":" in self.network else f"{self.network}:{self.port}"


class Target(msgspec.Struct, frozen=True):
    """A target as the data path needs it. `server_name` is the name that `verify-full` checks and that the gateway's
    own certificate for this target carries; `ca_pem` holds the trusted roots, empty for the system's store.
    `credential` names an entry of the host agent's credential source, and so does `serving`: the certificate that
    clients are shown, empty for one of the host's own CA. `databases` empty means any.
    """

    name: str
    protocol: str
    endpoints: tuple[Endpoint, ...]
    tls_mode: TlsMode
    server_name: str
    ca_pem: str
    credential: str
    databases: tuple[str, ...] = ()
    prefixes: tuple[Prefix, ...] = ()
    serving: str = ""

    def is_still(self, other: Target) -> bool:
        """Whether a session at this target may go on when the policy says `other` of it: all is the same but for the
        addresses, which a name may change at any time."""
        return msgspec.structs.replace(self, endpoints=(), prefixes=()) == msgspec.structs.replace(
            other, endpoints=(), prefixes=()
        )
