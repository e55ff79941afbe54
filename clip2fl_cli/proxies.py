"""Connections to this machine go without the proxy that the environment names."""

from collections.abc import Mapping

THIS_MACHINE = ("127.0.0.1", "localhost")
NO_PROXY = ("NO_PROXY", "no_proxy")


def direct_here(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep connections to this machine from a proxy.

    Flower's processes talk to each other over the loopback. Its HTTP client obeys
    ``HTTP_PROXY`` and ``HTTPS_PROXY`` even there, and does not understand networks such
    as ``127.0.0.0/8`` in ``NO_PROXY``.

    Parameters
    ----------
    environment : mapping of str to str
        The variables so far.

    Returns
    -------
    dict of str to str
        ``NO_PROXY`` in both spellings, since programs differ in which one they prefer.
    """
    named = [
        host.strip()
        for variable in NO_PROXY
        for host in environment.get(variable, "").split(",")
    ]
    hosts = dict.fromkeys(filter(None, [*named, *THIS_MACHINE]))
    if "*" in hosts:
        hosts = {"*": None}  # no host at all; many programs know it only by itself
    return dict.fromkeys(NO_PROXY, ",".join(hosts))
