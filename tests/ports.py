"""Loopback ports for servers that tests start."""

from __future__ import annotations

import contextlib
import random
import socket
from typing import Final

HOST: Final = "127.0.0.1"
_RANDOM: Final = random.SystemRandom()  # Hypothesis seeds the usual one: several processes would try the same ports


def free_port() -> int:
    """A port where nothing listens, and which no client is given as its own while a server restarts."""
    while True:
        port = _RANDOM.randint(10_000, 32_000)  # below the ports that Linux and macOS give to clients
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
