"""Which proxy the environment names for a store: the one that boto3 uses for its own requests."""

from __future__ import annotations

from urllib.parse import urlsplit

from botocore.httpsession import ProxyConfiguration  # type: ignore[import-untyped]
from botocore.utils import get_environ_proxies  # type: ignore[import-untyped]

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.weights.sources.http import HttpProxy

_DEFAULT_PORT = 80


def environment_proxy(url: str) -> HttpProxy | None:
    """Return the proxy that `http_proxy`, `https_proxy` and `no_proxy` name for a URL, if any.

    Raises:
        InvalidRequest: it is not an address, or of a kind that cannot be used.
    """
    named = ProxyConfiguration(get_environ_proxies(url))
    proxy_url = named.proxy_url_for(url)
    if not proxy_url:
        return None
    try:
        parts = urlsplit(proxy_url)
        host, port = parts.hostname, parts.port or _DEFAULT_PORT
        headers = named.proxy_headers_for(proxy_url)
    except ValueError:
        raise _unusable(url) from None
    if parts.scheme != "http" or not host or parts.path.strip("/"):
        raise _unusable(url)
    return HttpProxy(host=host, port=port, headers=headers)


def _unusable(url: str) -> InvalidRequest:
    # Not the proxy's URL: it may hold a password.
    variable = f"{urlsplit(url).scheme}_proxy"
    return InvalidRequest(
        f"weights cannot be read through the proxy in {variable}: write it as http://host:port"
    )
