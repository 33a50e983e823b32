"""What a call used: measured tokens by bucket, what is billed besides tokens, and the record that the ledger keeps.

Buckets are inclusive: `input_tokens` includes cache reads and writes, `output_tokens` includes
reasoning, `total = input + output`. `None` is unknown and never counted as zero.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["Outcome", "Usage", "UsageRecord"]

Outcome = Literal[
    "measured",  # the provider said what it used
    "estimated",  # a cut stream: counted from the text so far plus the input
    "unmetered",  # success without usage: charged the hold
    "unknown",  # sent, no answer seen: charged the hold
    "unseen",  # the request ended and no call was seen on an opaque route: charged the hold
    "provider_error",  # the provider answered an error without usage: no money, one iteration
    "not_dispatched",  # known not to have been sent: nothing
    "expired",  # the owner died: charged the hold
    "cached",  # answered from the cache: nothing was sent; `usage` is what the first answer used
]


class Usage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tokens of one call. `None` = unknown; 0 = known to be none."""

    input_tokens: int | None = None
    """All input, cache reads and writes included."""
    output_tokens: int | None = None
    """All output, reasoning included."""
    cache_read_tokens: int | None = None
    """Included in `input_tokens`."""
    cache_write_tokens: int | None = None
    """Included in `input_tokens`."""
    cache_write_1h_tokens: int | None = None
    """Included in `cache_write_tokens`: those with the longer lifetime, which cost more."""
    reasoning_tokens: int | None = None
    """Included in `output_tokens`."""
    input_audio_tokens: int | None = None
    """Included in `input_tokens`."""
    output_audio_tokens: int | None = None
    """Included in `output_tokens`."""
    input_image_tokens: int | None = None
    """Included in `input_tokens`."""
    output_image_tokens: int | None = None
    """Included in `output_tokens`."""
    images: int | None = None
    """Images that were generated, where each has its price."""
    audio_ms: int | None = None
    """Audio that was taken in, in milliseconds, where it is billed by its length."""
    characters: int | None = None
    """Characters that were spoken, where speech is billed by them."""
    web_searches: int | None = None
    """Searches that the provider made for the answer."""
    search_units: int | None = None
    """What Cohere bills a ranking by."""
    billed_input_tokens: int | None = None
    """What the provider bills for, where it says that this is another number than `input_tokens`."""
    billed_output_tokens: int | None = None
    """The same of `output_tokens`."""
    reported_nanousd: int | None = None
    """The cost that the provider itself reports."""
    service_tier: str | None = None
    """The tier that the response says it was served on."""
    model: str | None = None
    """The model that the response names, which is the one that is billed."""
    extra: tuple[Usage, ...] = ()
    """Billed beside this, each at the price of its own `model`: what other models did for the answer. Not included
    in the counts above."""

    @property
    def total_tokens(self) -> int | None:
        """Input plus output; `None` if either is unknown."""
        if self.input_tokens is None or self.output_tokens is None:
            return None
        return self.input_tokens + self.output_tokens


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the ledger: one call (or attempt), written once, together with its settlement."""

    call_id: str
    at_ms: int
    """When the call was admitted."""
    ended_ms: int | None = None
    request_id: str | None = None
    caller: str | None = None
    """The verified caller; `None` for the shared anonymous one."""
    user: str | None = None
    departments: tuple[str, ...] = ()
    """Each is charged in full; a grand total counts the row once."""
    agent: str | None = None
    session: str | None = None
    tags: tuple[str, ...] = ()
    route: str | None = None
    """The route's template, never the path."""
    provider: str | None = None
    model: str | None = None
    """The model that was asked for, resolved."""
    billed_model: str | None = None
    """The model that the price was taken from."""
    usage: Usage | None = None
    """What was measured; `None` when unknown."""
    cost_nanousd: int | None = None
    """What was charged to money meters; `None` when no price is known."""
    estimate_nanousd: int | None = None
    """The upper bound that was held."""
    tokens: int | None = None
    """What was charged to token meters."""
    outcome: Outcome = "measured"
    late: bool = False
    """Settled after its hold had expired."""
    price_source: str | None = None
    """Where the price comes from, and its date."""
    dispatched_ms: int | None = None
    first_token_ms: int | None = None
    """From dispatch to the first part of the answer, in milliseconds."""
    latency_ms: int | None = None
    """From dispatch to the end of the answer, in milliseconds."""
    attempt_of: str | None = None
    """The call id of the first attempt, if this is another one of the same call."""
    attempt: int = 1
    """Which attempt of its call this is, counted from 1."""
    deployment: str | None = None
    """The name of the gateway's deployment that it went to; `None`: it went to none."""
