"""A guard's configuration, its store and its records: what makes limits weaker than they look, or costs unseen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec

from asgi_llm_guard.describe import OLD_DAYS
from asgi_llm_guard.doctor.findings import Finding
from asgi_llm_guard.guard import Guard
from asgi_llm_guard.identity.headers import TrustedHeaders
from asgi_llm_guard.policies.base import Policy
from asgi_llm_guard.policies.models import ModelAllow
from asgi_llm_guard.policies.providers import provider_of
from asgi_llm_guard.pricing import PriceBook

if TYPE_CHECKING:
    from asgi_llm_guard.gateway.deployment import Deployment

__all__ = [
    "Pricing",
    "examine_clock",
    "examine_guard",
    "examine_prices",
    "examine_records",
    "examine_store",
    "models_named",
]

_MOST_SKEW_MS: Final = 2_000
_DAY_MS: Final = 86_400_000
_BY_PERSON: Final = frozenset({"user", "caller", "department:user", "caller:model", "user:model"})
_MONEY: Final = frozenset({"Budget", "ProviderBudget", "Quota"})


class Pricing(msgspec.Struct, frozen=True):
    """A model that may be asked for, and where it is named."""

    model: str
    where: str


def examine_guard(
    guard: Guard,
    *,
    extra: Sequence[Policy] = (),
    workers: int = 1,
    storage: str = "",
    routes_listed: bool = False,
    unlisted: str = "pass",
    unpriced: str = "deny",
    now_ms: int,
) -> list[Finding]:
    """What a guard's configuration gives away.

    `extra`: policies of routes. `workers`: how many processes serve. `storage`: the URL's scheme, such as `memory`.
    `unpriced`: what a model without a price costs: `deny`, `allow` or `charge_as`.
    """
    findings: list[Finding] = []
    policies = (*guard.policies, *extra)
    findings += _store_kind(storage, workers)
    findings += _identity(guard, policies)
    if not policies:
        findings.append(_note("no_policies", "there is no policy: nothing is limited", "add [[policies]]"))
    for policy in policies:
        if getattr(policy, "on_outage", "deny") == "allow" and not policy.name.endswith(".shadow"):
            findings.append(
                _warning(
                    "outage_open",
                    f"{policy.name}: on_outage=allow admits every call while the storage is away",
                    "on_outage='local' keeps a share of the limit in each process; 'deny' refuses",
                )
            )
    if guard.engine.loss.on_data_loss == "accept":
        findings.append(
            _warning(
                "data_loss_open",
                "on_data_loss=accept: a storage that was flushed opens every budget again",
                "on_data_loss='deny' waits for accept_data_loss; 'rebuild' tells it what the processes know",
            )
        )
    if routes_listed and unlisted == "pass":
        findings.append(
            _note(
                "unlisted_pass",
                "routes are listed, and requests to others pass: their calls are guarded only where they are hooked",
                "unlisted='deny' refuses every other request that is not GET, HEAD or OPTIONS",
            )
        )
    if unpriced == "allow" and any(type(policy).__name__ in _MONEY for policy in policies):
        findings.append(
            _warning(
                "unpriced_free",
                "prices.unknown=allow: a model without a price costs nothing under every budget",
                "unknown='deny' refuses it; { charge_as = MODEL } charges it as another one; or state its price",
            )
        )
    findings += _age(guard.prices, now_ms)
    return findings


def _store_kind(storage: str, workers: int) -> list[Finding]:
    if storage != "memory":
        return []
    if workers > 1:
        return [
            _error(
                "no_shared_store",
                f"storage memory:// with {workers} workers: each counts by itself, so limits are {workers} times as high",
                "storage = 'sqlite:///guard.db' for the processes of one host, redis:// for several",
            )
        ]
    return [
        _warning(
            "memory_store",
            "storage memory:// is lost with the process, and right for a single one only",
            "storage = 'sqlite:///guard.db', or redis://; with --workers N this is an error",
        )
    ]


def _identity(guard: Guard, policies: Sequence[Policy]) -> list[Finding]:
    identity = guard.identity
    if isinstance(identity, TrustedHeaders) and identity.believes_everybody:
        return [
            _error(
                "unverified_identity",
                "trusted_headers with trust_headers=true: every client says itself who it is",
                "list the networks of your proxies in `proxies`, or verify keys or tokens",
            )
        ]
    if identity is not None:
        return []
    by_person = [policy.name for policy in policies if getattr(policy, "per", None) in _BY_PERSON]
    if by_person:
        return [
            _error(
                "no_identity",
                f"no identity is configured, and {', '.join(by_person)} count by caller: all are one anonymous caller",
                "[identity] with kind = 'api_keys', 'jwt', 'scope_user' or 'trusted_headers'",
            )
        ]
    return [
        _warning(
            "no_identity",
            "no identity is configured: every request is the same anonymous caller",
            "[identity] with kind = 'api_keys', 'jwt', 'scope_user' or 'trusted_headers'",
        )
    ]


def _age(prices: PriceBook, now_ms: int) -> list[Finding]:
    compiled = datetime.fromisoformat(prices.date).replace(tzinfo=UTC)
    days = (now_ms - int(compiled.timestamp()) * 1000) // _DAY_MS
    if days <= OLD_DAYS:
        return []
    return [
        _warning(
            "old_prices",
            f"the price list is {days} days old ({prices.date})",
            "take a newer release, or state what has changed in [prices.overrides]; see `asgi-llm-guard prices diff`",
        )
    ]


# --------------------------------------------------------------------------------------- prices


def models_named(
    policies: Iterable[Policy], deployments: Iterable[Deployment] = (), aliases: Iterable[str] = ()
) -> list[Pricing]:
    """The models that the configuration names one by one: in allow-lists, as deployments, behind aliases."""
    named: list[Pricing] = []
    for policy in policies:
        if isinstance(policy, ModelAllow):
            named += [
                Pricing(entry, f"allow-list {policy.name}") for entry in policy.entries if not entry.endswith("*")
            ]
    named += [Pricing(deployment.priced_model, f"deployment {deployment.name}") for deployment in deployments]
    named += [Pricing(target, "alias") for target in aliases if "/" in target]
    return list(dict.fromkeys(named))


def examine_prices(prices: PriceBook, named: Iterable[Pricing]) -> list[Finding]:
    """Models that the configuration names and that have no price."""
    findings = []
    for each in named:
        provider, model = provider_of(each.model)
        if prices.resolve(provider, model) is None:
            findings.append(_unpriced(each.model, each.where, "warning"))
    return findings


def examine_records(prices: PriceBook, models: Iterable[tuple[str, int, int]]) -> list[Finding]:
    """Models that were called and have no price: `provider/model`, how many calls, and how many of unknown cost.

    By today's prices: what was charged nothing, because no price was known and none was needed, is found too.
    """
    findings = []
    for name, calls, unpriced in models:
        provider, model = provider_of(name)
        if prices.resolve(provider, model) is None:
            findings.append(_unpriced(name, f"in use: {calls:,} calls in 30 days", "error"))
        elif unpriced:
            findings.append(
                _note(
                    "was_unpriced",
                    f"{name}: {unpriced:,} calls were made without a price; there is one now",
                    "`asgi-llm-guard ledger reprice` charges a period anew, beside what was charged",
                )
            )
    return findings


def _unpriced(model: str, where: str, severity: str) -> Finding:
    make = _error if severity == "error" else _warning
    return make(
        "unpriced_model",
        f"no price is known for {model} ({where})",
        f'[prices.overrides."{model}"] with input and output in $ per million tokens',
    )


# ---------------------------------------------------------------------------------------- store


def examine_clock(store_ms: int, asked_ms: int, answered_ms: int) -> list[Finding]:
    """Whether the storage's clock and this host's agree, by the answer to a question that was on its way in between."""
    if asked_ms - _MOST_SKEW_MS <= store_ms <= answered_ms + _MOST_SKEW_MS:
        return []
    behind = asked_ms - store_ms
    skew_ms = behind if behind > 0 else store_ms - answered_ms
    return [
        _warning(
            "clock_skew",
            f"the storage's clock is {skew_ms / 1000:,.1f} s {'behind' if behind > 0 else 'ahead of'} this host's",
            "run NTP on both; windows end by the storage's clock, tokens and records by this host's",
        )
    ]


def examine_store(error: Exception) -> Finding:
    """A storage, or a database, that did not answer."""
    return _error("store_away", str(error), "start it, or correct its URL; until then calls are refused (on_outage)")


def _error(code: str, seen: str, next_step: str) -> Finding:
    return Finding(severity="error", code=code, seen=seen, next_step=next_step)


def _warning(code: str, seen: str, next_step: str) -> Finding:
    return Finding(severity="warning", code=code, seen=seen, next_step=next_step)


def _note(code: str, seen: str, next_step: str) -> Finding:
    return Finding(severity="note", code=code, seen=seen, next_step=next_step)
