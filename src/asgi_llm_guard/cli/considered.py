"""What decides about calls and is in no candidate file: which keys callers had, and what a simulation passes over."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from asgi_llm_guard.cli.common import Tool
from asgi_llm_guard.errors import ConfigurationError, StorageError

if TYPE_CHECKING:
    from asgi_llm_guard.control.state import ControlState
    from asgi_llm_guard.settings import GuardSettings
    from asgi_llm_guard.usage import UsageRecord

__all__ = ["Holder", "Holders", "PassedOver", "administered", "holders_of", "passed_over", "seen"]

_NOTHING: Final[Mapping[str, object]] = MappingProxyType({})
_NO_POLICIES: Final = frozenset({"guard", "sessions", "stop"})
"""What refusals are told under that no policy made."""
_DEPLOYMENTS: Final = "deployment_limits"


class PassedOver(msgspec.Struct, frozen=True, kw_only=True):
    """Something that decides in the service, and played no part in this run."""

    what: str
    """`keys`, `deployments`, `functions`, `administration`, `clamp`."""
    told: str
    records: int | None = None
    """How many records of this run it is about; `None`: nobody knows."""


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a key stands for, and the limits that belong to it."""

    caller: str
    user: str | None
    departments: tuple[str, ...]
    agent: str | None
    params: Mapping[str, object]

    def may_be(self, record: UsageRecord) -> bool:
        """Whether the call of a record may have been made with the key."""
        return (
            self.caller == record.caller
            and self.user in (None, record.user)
            and self.agent in (None, record.agent)
            and set(self.departments) <= set(record.departments)
        )


class Holders:
    """The limits of keys by what records say of who called: a record names no key."""

    def __init__(self, holders: Iterable[Holder]) -> None:
        self._by_caller: dict[str, list[Holder]] = {}
        for holder in holders:
            self._by_caller.setdefault(holder.caller, []).append(holder)
        self.unsure: Counter[str] = Counter()
        """Records by caller of which several keys may have been shown, with different limits."""

    def __bool__(self) -> bool:
        return any(holder.params for holders in self._by_caller.values() for holder in holders)

    def params(self, record: UsageRecord) -> Mapping[str, object]:
        """The limits of the key that was shown; none where it cannot be told which it was."""
        found = [holder for holder in self._by_caller.get(record.caller or "", ()) if holder.may_be(record)]
        if not found:
            return _NOTHING
        if any(each.params != found[0].params for each in found):
            self.unsure[str(record.caller)] += 1
            return _NOTHING
        return found[0].params


def holders_of(settings: GuardSettings, state: ControlState | None) -> list[Holder]:
    """The keys of a settings file's own file, and of administration data, those that have ended too."""
    from asgi_llm_guard.identity.keys import read_toml

    file = getattr(settings.identity, "file", None)
    kept = () if file is None else read_toml(settings.directory / file).get("keys", ())
    administered = () if state is None else state.keys.values()
    return [
        *(_holder({name: key.get(name) for name in Holder.__struct_fields__}) for key in kept),
        *(_holder({name: getattr(key.value, name) for name in Holder.__struct_fields__}) for key in administered),
    ]


def _holder(fields: Mapping[str, Any]) -> Holder:
    return Holder(
        caller=str(fields["caller"]),
        user=fields["user"],
        departments=tuple(fields["departments"] or ()),
        agent=fields["agent"],
        params=dict(fields["params"] or {}),
    )


async def administered(tool: Tool, settings: GuardSettings) -> tuple[ControlState | None, str]:
    """The administration data of these settings, and why they could not be read; empty: they were, or there are none."""
    from asgi_llm_guard.settings.build import build_control

    if settings.control is None:
        return None, ""
    if (file := tool.missing("control", settings)) is not None:
        return None, f"there is no file {file}"
    control = build_control(settings)
    try:
        return await control.state(), ""
    except (ConfigurationError, StorageError) as error:
        return None, str(error)
    finally:
        await control.aclose()


async def seen(
    batches: AsyncIterator[Sequence[UsageRecord]], deployments: Counter[str]
) -> AsyncIterator[Sequence[UsageRecord]]:
    """The batches as they come, with what went to deployments counted."""
    async for batch in batches:
        deployments.update([record.deployment for record in batch if record.deployment is not None])
        yield batch


def passed_over(
    settings: GuardSettings,
    *,
    holders: Holders,
    deployments: Mapping[str, int],
    refused: Mapping[str, int],
    policies: Iterable[str],
    state: ControlState | None,
    unread: str,
    clamps: bool,
    now_ms: int,
) -> list[PassedOver]:
    """What decides in the service and played no part.

    `deployments`: how many records went to each. `refused`: how often each policy has refused in the period, by the
    ledger. `policies`: those that were replayed. `unread`: why the administration data could not be read. `clamps`: routes
    lower output limits, and policies were asked by themselves.
    """
    found = []
    if holders.unsure:
        callers = ", ".join(sorted(holders.unsure)[:5]) + (", …" if len(holders.unsure) > 5 else "")
        told = f"limits of single keys of {callers}: they have several with different ones, and records name no key"
        found.append(PassedOver(what="keys", told=told, records=holders.unsure.total()))
    limited = _limited(settings)
    records = sum(number for name, number in deployments.items() if name in limited)
    if records or _DEPLOYMENTS in refused:
        told = "limits of deployments: where one has none left the router takes another one, which nobody can replay"
        found.append(PassedOver(what="deployments", told=told, records=records))
    known = {*policies, *_NO_POLICIES, _DEPLOYMENTS}
    for name in sorted(refused.keys() - known):
        told = (
            f"the policy {name}, which refused {refused[name]:,} times in the period: of @guarded, or of another file"
        )
        found.append(PassedOver(what="functions", told=told))
    if clamps:
        told = "clamp of routes: a policy that is asked by itself lowers no output limit"
        found.append(PassedOver(what="clamp", told=told))
    if unread:
        found.append(PassedOver(what="administration", told=f"administration data, which could not be read: {unread}"))
    elif state is not None and (kinds := _kinds(state, now_ms)):
        told = f"administration data, which win over the candidate in the service: {kinds}"
        found.append(PassedOver(what="administration", told=told))
    return found


def _limited(settings: GuardSettings) -> set[str]:
    """The deployments that have limits of their own."""
    if settings.gateway is None:
        return set()
    from asgi_llm_guard.gateway.entries import parse_deployments
    from asgi_llm_guard.settings import build_gateway_arguments

    made = parse_deployments(build_gateway_arguments(settings)["deployments"])
    fields = ("rpm", "tpm", "max_parallel")
    return {each.name for each in made if each.limits or any(getattr(each, name) is not None for name in fields)}


def _kinds(state: ControlState, now_ms: int) -> str:
    held = {
        "departments": len(state.departments),
        "agents": len(state.agents),
        "prices": len(state.prices),
        "raises": sum(entry.value.until_ms > now_ms for entry in state.raises.values()),
        "stops": sum(entry.value.holds(now_ms) for entry in state.stops.values()),
    }
    return ", ".join(f"{number} {kind}" for kind, number in held.items() if number)
