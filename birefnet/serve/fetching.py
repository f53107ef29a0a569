"""
Photos from URLs that strangers name, fetched from public addresses only.

A name is resolved once and the connection goes to the very address that was checked, so that a second DNS answer
changes nothing. Every redirect is checked in the same way.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable

import httpx

from birefnet.serve.errors import InvalidPhotoError, RequestError, TooLargeError, TooSlowError
from birefnet.serve.limits import Limits


PORTS = {"http": 80, "https": 443}
# Ranges that `ipaddress` counts as global although what answers there may be inside the operator's network: IPv4
# addresses inside IPv6 (NAT64, 6to4, Teredo), and the shared address space of carriers.
_TUNNELS = tuple(
    map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "100.64.0.0/10"))
)

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host, as the system's resolver has them."""
    loop = asyncio.get_running_loop()
    entries = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(entry[4][0] for entry in entries))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet: not loopback, private, link-local, metadata, multicast."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    if any(parsed in network for network in _TUNNELS if network.version == parsed.version):
        return False
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


class PhotoFetcher:
    """
    Args:
        limits: bytes, seconds and redirects of a fetch.
        allowed: whether URLs are fetched at all.
        resolve: how names become addresses.
        is_allowed_address: which addresses may be connected to.
    """

    def __init__(
        self,
        limits: Limits,
        allowed: bool = True,
        resolve: Resolve = resolve,
        is_allowed_address: Callable[[str], bool] = is_public,
    ):
        self.limits, self.allowed = limits, allowed
        self._resolve, self._is_allowed_address = resolve, is_allowed_address
        # No proxy of the environment: it would connect in our place, to whatever address it finds.
        self._client = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=limits.url_seconds,
            limits=httpx.Limits(max_connections=16),
        )

    async def fetch(self, url: str) -> bytes:
        """
        The body of a URL, as it is.

        Raises:
            RequestError: URLs are not allowed here, this one leads to an address that is not public, it cannot be
                fetched, or it is too large or too slow.
        """
        if not self.allowed:
            raise RequestError("This server fetches no URLs; send the photo itself.", "url_not_allowed", 403)
        try:
            return await asyncio.wait_for(self._follow(url), self.limits.url_seconds)
        except asyncio.TimeoutError:
            raise TooSlowError(f"The URL took longer than {self.limits.url_seconds:g} s.", status=400) from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise RequestError(f"The URL cannot be fetched ({type(error).__name__}).", "url_failed") from None

    async def _follow(self, url: str) -> bytes:
        for _ in range(self.limits.redirects + 1):
            body, location = await self._get(url)
            if location is None:
                return body
            url = location
        raise RequestError(f"The URL redirects more than {self.limits.redirects} times.", "url_failed")

    async def _get(self, url: str) -> tuple[bytes, str | None]:
        """The body and None, or nothing and where the answer redirects to."""
        target = httpx.URL(url)
        address = await self._checked_address(target)
        request = self._client.build_request(
            "GET",
            target.copy_with(host=address),
            headers={
                "Host": target.netloc.decode("ascii"),
                "User-Agent": "birefnet",
                "Accept": "image/*",
                "Accept-Encoding": "identity",  # see `_read`
            },
            extensions={"sni_hostname": target.raw_host.decode("ascii")},  # and the name in the certificate
        )
        response = await self._client.send(request, stream=True)
        try:
            if response.is_redirect and "location" in response.headers:
                return b"", str(target.join(response.headers["location"]))
            if response.status_code != 200:
                raise RequestError(f"The URL answers with status {response.status_code}.", "url_failed")
            return await self._read(response), None
        finally:
            await response.aclose()

    async def _checked_address(self, target: httpx.URL) -> str:
        if target.scheme not in PORTS:
            raise RequestError("A URL has to begin with http:// or https://.", "invalid_url")
        if not target.host or target.userinfo:
            raise RequestError("A URL needs a host, and no user name or password.", "invalid_url")
        port = target.port or PORTS[target.scheme]
        if port != PORTS[target.scheme] and port < 1024:
            raise RequestError(f"Port {port} is not one of a web server.", "invalid_url")
        try:
            addresses = await self._resolve(target.raw_host.decode("ascii"), port)
        except OSError:
            raise RequestError(f"The host {target.host[:100]} is not known.", "url_failed") from None
        # All of them: a name that has a private address beside a public one is an attempt.
        if not addresses or not all(map(self._is_allowed_address, addresses)):
            raise RequestError("The URL leads to an address that is not public.", "url_not_allowed", 403)
        return addresses[0]

    async def _read(self, response: httpx.Response) -> bytes:
        limit = self.limits.upload_bytes
        if int(response.headers.get("content-length") or 0) > limit:
            raise TooLargeError(f"The URL announces more than {limit:,} bytes.")
        # Never unpacked: a few kilobytes of Brotli can become gigabytes before they can be counted.
        if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise RequestError("The URL sends a compressed answer that was not asked for.", "url_failed")
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > limit:
                raise TooLargeError(f"The URL sends more than {limit:,} bytes.")
        if not body:
            raise InvalidPhotoError("The URL sends an empty file.")
        return bytes(body)

    async def close(self) -> None:
        await self._client.aclose()
