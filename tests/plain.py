"""What HTTP clients of the tests have in common that speak no TLS."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any, Final

PLAIN: Final[Mapping[str, Any]] = {"trust_env": False, "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}
"""Neither the proxies of the environment nor the certificates of the system, which take 20 ms of CPU to read."""
