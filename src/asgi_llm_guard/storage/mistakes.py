"""What callers get wrong in plans: one wording for all storages. A `ValueError` each, raised before anything is taken."""

from __future__ import annotations

from asgi_llm_guard.claims import Meter

__all__ = ["called_twice", "claimed_twice", "no_member", "no_plan", "not_open"]


def no_plan() -> ValueError:
    return ValueError("reserve: expected at least one plan, got none")


def called_twice() -> ValueError:
    return ValueError("reserve: two bundles of one plan have the same call id")


def claimed_twice(key: str) -> ValueError:
    return ValueError(f"two claims of one plan are on the meter {key!r}; merge them into one")


def no_member(meter: Meter) -> ValueError:
    return ValueError(f"{meter.policy}: a claim on distinct ids names its id, got None (meter {meter.key!r})")


def not_open(call_id: str) -> ValueError:
    return ValueError(
        f"reserve: call ids are reserved together, but {call_id!r} is not open and others of its plan are"
    )
