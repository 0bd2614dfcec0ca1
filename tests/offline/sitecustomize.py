"""Denies the network to a Python process; on PYTHONPATH, to every process that tests start."""

import sys

LOCAL = ("", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::", None)
denied: list[str] = []  # what this process wanted to reach


def deny(event: str, arguments: tuple) -> None:
    """An audit hook: OSError for any address but this machine's own."""
    if event == "socket.connect":
        address = arguments[1]
    elif event == "socket.getaddrinfo":
        address = arguments
    else:
        return
    if not isinstance(address, tuple):  # a socket between processes
        return
    host = address[0].decode() if isinstance(address[0], bytes) else address[0]
    if host not in LOCAL:
        denied.append(host)
        raise OSError(f"{host}: the tests have no network")


sys.addaudithook(deny)
