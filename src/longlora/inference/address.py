"""Where a page or a server listens: this machine alone unless a person says otherwise."""

from __future__ import annotations

import ipaddress
import socket

from longlora.errors import DataError

LOOPBACK = "127.0.0.1"


def warning(host: str, what: str) -> str | None:
    """What a person should know before `what` listens on `host`; None for this machine alone."""
    if is_loopback(host):
        return None
    return (
        f"warning: {what} listens on {host} without a password: whoever reaches this machine can use the model; "
        f"leave --host out to keep it to this machine"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_free(host: str, port: int) -> None:
    """Say before a model is loaded that nothing can listen there.

    Raises:
        DataError: the port is out of range or taken, or the host is no address of this machine.
    """
    if not 0 < port < 65536:
        raise DataError(f"port {port} is not from 1 to 65535: 8000 and 7860 are usual")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot listen on {host} port {port} ({reason}): give another --port or --host") from None
