"""Where a served model is and how to get there: address, proxy, authorities and key."""

import os
import ssl
import urllib.request
from base64 import b64encode
from typing import Any

import certifi
from yarl import URL

from teams_hpc.errors import EngineError


def chat_url(base_url: str) -> URL:
    """Where chat completions are asked for.

    Raises:
        EngineError: That is no address.
    """
    try:
        url = URL(f"{base_url.rstrip('/')}/chat/completions")
    except ValueError as error:
        raise EngineError(f"base_url {base_url} is no address: {error}") from None
    if not url.host:
        raise EngineError(f"base_url {base_url} is no address; for instance http://node7:8000/v1")
    return url


def proxy_for(url: URL) -> dict[str, Any]:
    """How to send through the environment's proxy (http_proxy, no_proxy and the like).

    Its password goes into a header: errors quote addresses.

    Returns:
        Arguments for a request of aiohttp.

    Raises:
        EngineError: The environment names no HTTP proxy.
    """
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(url.raw_authority):
        return {}
    try:
        place = URL(proxy if "://" in proxy else f"http://{proxy}")
    except ValueError:
        place = URL()
    if place.scheme not in ("http", "https") or not place.host:
        raise EngineError(
            f"the environment's proxy for {url.scheme} ({url.scheme}_proxy or all_proxy) is no "
            "address of an HTTP proxy; for instance http://proxy:3128"
        )
    if place.user is None:
        return {"proxy": place}
    login = b64encode(f"{place.user}:{place.password or ''}".encode()).decode()
    # Over TLS the proxy sees its own request alone, else the one and only.
    headers = "proxy_headers" if url.scheme == "https" else "headers"
    return {"proxy": place.with_user(None), headers: {"Proxy-Authorization": f"Basic {login}"}}


def authorities() -> ssl.SSLContext:
    """The machine's, as a site may have some of its own, and the usual ones: images have none."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def read_key(variable: str | None) -> str | None:
    """The key in an environment variable; None if there is to be none.

    Raises:
        EngineError: The variable isn't set or holds no key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EngineError(f"the environment variable {variable} is not set; export the key")
    if not (key.isascii() and key.isprintable()):
        # Checked here, since a client quotes a header that it refuses.
        raise EngineError(
            f"the environment variable {variable} holds characters that no key has (a line break, "
            "or letters beyond ASCII); export the key alone"
        )
    return key
