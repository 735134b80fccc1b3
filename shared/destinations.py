"""Where a webhook may go. No I/O.

Rule 1: a URL is taken apart once, by a grammar narrower than any client's, and sent to by its parts. What two parsers
        could read differently is refused.
Rule 2: where a client names the URL, only public addresses are connected to. The address that counts is the one that
        the connection goes to, so it is checked there (worker/webhook_post.py); here only what the URL says itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

MAX_URL_LENGTH = 2048
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>[/?][\x21-\x22\x24-\x5b\x5d-\x7e]*)?",  # printable ASCII, no `#`, no `\`
)
_NAME = re.compile(r"(?!.{254})[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label that resolvers take for a part of an IPv4 address
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")  # its last 32 bits are an IPv4 address
_NOT_PUBLIC = (  # what `is_global` lets pass, at least in some versions of Python
    ip_network("192.0.0.0/24"),  # a metadata service is there, too
    ip_network("192.88.99.0/24"),
    ip_network("168.63.129.16/32"),  # public by its number; in Azure, the virtual machine's own host answers there
    ip_network("2001::/23"),
    ip_network("3fff::/20"),
)
_DEFAULT_PORTS = {"https": 443, "http": 80}


class DestinationError(ValueError):
    """A webhook must not go there. The message says why, and repeats nothing of the URL."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A URL, taken apart."""

    scheme: str  # `https` or `http`
    host: str  # a name in lower case, or an address without brackets
    port: int
    target: str  # path and query

    @property
    def origin(self) -> str:
        """What a log may say: path and query may hold a secret."""
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def destination(url: str, *, public_only: bool) -> Destination:
    """Takes a URL apart. `public_only`: a client has named it. Raises DestinationError."""
    match = _URL.fullmatch(url) if len(url) <= MAX_URL_LENGTH else None
    if match is None:
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise DestinationError("must not hold a user name or a password")
        raise DestinationError(
            f"must be an http(s) URL of up to {MAX_URL_LENGTH} ASCII characters, without a fragment and without `\\`"
        )
    scheme, host, target = match["scheme"], match["host"].lower(), match["target"] or "/"
    port = int(match["port"] or _DEFAULT_PORTS[scheme])
    if not 1 <= port <= 65535:
        raise DestinationError("must have a port from 1 to 65535")
    address = _literal(host)
    if public_only:
        if scheme != "https":
            raise DestinationError("must be an https URL")
        if port < 1024 and port != 443:  # other services listen there, and take what is sent for their own protocol
            raise DestinationError("must have the port 443, or one from 1024 on")
        if host == "localhost" or host.endswith(".localhost") or (address and not is_public(address)):
            raise DestinationError("must have a public address")
    return Destination(scheme, address or host, port, target if target.startswith("/") else f"/{target}")


def _literal(host: str) -> str | None:
    """The address that a host is; None: it is a name. Raises DestinationError if it is neither."""
    bracketed = host.startswith("[")
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        address = None
    if address is not None and (address.version == 6) == bracketed:
        return str(address)
    if bracketed or not _NAME.fullmatch(host) or _NUMBER.fullmatch(host.rpartition(".")[2]):
        raise DestinationError("must have a host that is a name or an address in its usual form")
    return None


def is_public(address: str) -> bool:
    """Whether an address is one of the internet: not private, not of this host or link, not multicast, not reserved.

    An IPv4 address inside of an IPv6 address is what counts there.
    """
    try:
        parsed = ip_address(address)
    except ValueError:  # such as a link-local one with its interface, `fe80::1%eth0`
        return False
    inner = _inner(parsed) if isinstance(parsed, IPv6Address) else parsed
    if not inner.is_global or any(inner in network for network in _NOT_PUBLIC):
        return False
    if isinstance(inner, IPv6Address):
        return inner in _GLOBAL_UNICAST
    return not inner.is_multicast and not inner.is_reserved


def _inner(address: IPv6Address) -> IPv4Address | IPv6Address:
    """What an address is translated to, or tunnelled to."""
    if address.scope_id is None and address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
