"""Fakes for tests, of this package and of its users: a clock, an LLM provider with a bill, clients that leave,
a storage that goes away.

Nothing here sleeps or waits for the time of day. What has to wait, waits for a `Gate`.
"""

from asgi_llm_guard.testing.asgi import Disconnect, asgi_client, kill_self
from asgi_llm_guard.testing.behaviour import Behaviour, ConnectionCut, Trouble
from asgi_llm_guard.testing.bill import DEFAULT_PRICE, Attempt, Bill, Price
from asgi_llm_guard.testing.cache import assert_no_foreign_hits
from asgi_llm_guard.testing.clock import FrozenClock
from asgi_llm_guard.testing.gates import Gate
from asgi_llm_guard.testing.hosts import Platform
from asgi_llm_guard.testing.outage import OutageStorage
from asgi_llm_guard.testing.provider import FakeProvider
from asgi_llm_guard.testing.reroute import Rerouted
from asgi_llm_guard.testing.sale import FakeRequest
from asgi_llm_guard.testing.serving import BaseURL

__all__ = [
    "DEFAULT_PRICE",
    "Attempt",
    "BaseURL",
    "Behaviour",
    "Bill",
    "ConnectionCut",
    "Disconnect",
    "FakeProvider",
    "FakeRequest",
    "FrozenClock",
    "Gate",
    "OutageStorage",
    "Platform",
    "Price",
    "Rerouted",
    "Trouble",
    "asgi_client",
    "assert_no_foreign_hits",
    "kill_self",
]
