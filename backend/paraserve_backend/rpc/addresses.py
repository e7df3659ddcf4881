"""Addresses as users write them: host:port, an IPv6 host in brackets."""

from __future__ import annotations

from paraserve_backend.errors import InvalidRequest

_LAST_PORT = 65535


def split_address(address: str) -> tuple[str, int]:
    """Return the host, without brackets, and the port.

    Raises:
        InvalidRequest: it is no such address.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and int(port) <= _LAST_PORT):
        raise InvalidRequest(f"'{address}' is not an address; write it as host:port.")
    return host.strip("[]"), int(port)


def with_port(address: str, port: int) -> str:
    """Return the address with another port."""
    return f"{address.rpartition(':')[0]}:{port}"
