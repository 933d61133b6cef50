"""Proxies that the environment names for what Flower's client, over httpx, connects to."""

import os
from typing import Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from fedalt.flower.addresses import host_and_port, is_loopback

_NAMES: Final = {"https": ("HTTPS_PROXY", "ALL_PROXY"), "http": ("HTTP_PROXY", "ALL_PROXY")}


def reach_loopback_directly(host: str) -> None:
    """No proxy stands between this machine and itself: leave it out for such a host.

    That is for this process and those that it starts.
    """
    if not is_loopback(host):
        return
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [known, host]))


def through_proxy(address: str, *, secure: bool) -> str:
    """Which proxy stands before a server at host:port and what goes round it; "" for none.

    The words go behind an error. A password in the proxy's address is left out.
    """
    (host, _), proxies = host_and_port(address), getproxies()
    scheme = "https" if secure else "http"
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy or is_loopback(host) or proxy_bypass(host):
        return ""
    variable = _NAMES[scheme][0 if proxies.get(scheme) else 1]
    place = urlsplit(proxy if "//" in proxy else f"//{proxy}").netloc.rpartition("@")[2]
    return (
        f"; it was tried through the proxy {place} that {variable} names: "
        f"where the server is reached without it, set NO_PROXY={host}"
    )
