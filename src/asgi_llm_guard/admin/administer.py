"""What forms and API have in common: every change that can be made, made once.

Rule 1: a change needs administration data to be written into: without them nothing could be audited.

Rule 2: what is malformed is a 422 that names the field; what was changed meanwhile is a 409 that shows both values.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from asgi_llm_guard.admin.asked import Asked, ProblemError
from asgi_llm_guard.admin.bodies import NewKey, NewRaise, NewStop, Reset
from asgi_llm_guard.control import Actor, Conflict, Control, ControlState, Key, NotThere, Raise, Stop
from asgi_llm_guard.control.data import shown as shown_value
from asgi_llm_guard.control.values import Kind
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.standing import ResetMeter
from asgi_llm_guard.windows import duration_ms

__all__ = [
    "actor_of",
    "control_of",
    "end",
    "field_in",
    "make_key",
    "put",
    "raise_limit",
    "remove",
    "reset",
    "revoke",
    "rotate",
    "stop",
]

_WORD: Final = re.compile(r"[a-z][a-z_0-9]*")
_NAMED: Final = re.compile(r"([a-z][a-z_0-9]*):")
_FIELDS: Final = frozenset(
    [
        "models",
        "daily_tokens",
        "monthly_tokens",
        "daily_cost",
        "monthly_cost",
        "tz",
        "max_iterations",
        "params",
        "entry",
        "from_ms",
        "until_ms",
        "cache",
        "acl",
        "version",
        "scope",
        "subject",
        "caller",
        "user",
        "departments",
        "agent",
        "tags",
        "policy",
        "unit",
        "amount",
        "overlap",
        "lasts",
        "by",
        "where",
        "limit",
    ]
)


def control_of(asked: Asked) -> Control:
    """Raises `ProblemError` (409): there are no administration data."""
    if asked.desk.control is None:
        raise ProblemError(
            409,
            "This service keeps no administration data, so nothing can be changed here. "
            "Give the guard a database for them: Guard(control='sqlite:///control.db').",
        )
    return asked.desk.control


def actor_of(asked: Asked) -> Actor:
    assert asked.credential is not None, "the gate lets nobody in without one"  # noqa: S101
    return Actor(name=asked.credential.name, role=asked.credential.role, address=asked.address)


async def put(
    asked: Asked, kind: Kind, name: str, value: Mapping[str, Any], *, reason: str, expected: int | None
) -> ControlState:
    control = control_of(asked)
    try:
        return await control.put(kind, name, value, actor=actor_of(asked), reason=reason, expected=expected)
    except Conflict as conflict:
        raise await _conflict(control, kind, name, value, conflict) from None
    except ConfigurationError as error:
        raise _malformed(error, value) from None


async def remove(asked: Asked, kind: Kind, name: str, *, reason: str, expected: int | None) -> ControlState:
    control = control_of(asked)
    try:
        return await control.remove(kind, name, actor=actor_of(asked), reason=reason, expected=expected)
    except NotThere:
        raise ProblemError(404, "It is not there, or not any more.") from None
    except Conflict as conflict:
        raise await _conflict(control, kind, name, None, conflict) from None
    except ConfigurationError as error:
        raise _malformed(error, {}) from None


async def stop(asked: Asked, wanted: NewStop) -> tuple[str, int]:
    """Stop something everywhere, and at once in this process. Gives the stop's id, and what ended here."""
    name = f"stop-{secrets.token_hex(6)}"
    value: dict[str, Any] = {"scope": wanted.scope, "subject": wanted.subject, "reason": wanted.reason}
    if wanted.caller:
        value["caller"] = wanted.caller
    if wanted.lasts:
        value["until_ms"] = asked.now_ms + _length_ms(wanted.lasts)
    state = await put(asked, "stop", name, value, reason=wanted.reason, expected=0)
    made: Stop = state.stops[name].value
    return name, asked.desk.guard.stop(made)


async def raise_limit(asked: Asked, wanted: NewRaise) -> str:
    """Raise a limit for a while; gives the raise's id."""
    name = f"raise-{secrets.token_hex(6)}"
    value: dict[str, Any] = {
        "policy": wanted.policy,
        "unit": wanted.unit,
        "amount": str(wanted.amount),
        "until_ms": asked.now_ms + _length_ms(wanted.lasts),
        "reason": wanted.reason,
    }
    value |= {field: told for field in ("scope", "subject", "caller") if (told := getattr(wanted, field))}
    try:
        wished = Raise(**value)
    except ConfigurationError as error:
        raise _malformed(error, value) from None
    try:
        wished.check(asked.desk.guard.policies)
    except ConfigurationError as error:
        raise ProblemError(422, str(error), field="unit") from None
    await put(asked, "raise", name, value, reason=wanted.reason, expected=0)
    return name


async def end(asked: Asked, kind: Kind, name: str, *, reason: str) -> None:
    """Take back a stop or a raise before its time."""
    await remove(asked, kind, name, reason=reason, expected=None)


async def reset(asked: Asked, wanted: Reset) -> Sequence[ResetMeter]:
    """Set the limits of a subject to unused; gives what was reset."""
    control = control_of(asked)
    actor = actor_of(asked)
    await control.version()  # what could not be audited is not done
    try:
        done = await asked.desk.guard.reset(
            wanted.scope, wanted.subject, caller=wanted.caller or None, policies=tuple(wanted.policies)
        )
    except ConfigurationError as error:
        raise _malformed(error, {"scope": wanted.scope, "subject": wanted.subject}) from None
    target = f"{wanted.scope}:{wanted.subject}" if wanted.subject else wanted.scope
    used = [{"policy": each.policy, "unit": each.unit.value, "used": each.used} for each in done]
    await control.note("reset", target, actor=actor, reason=wanted.reason, old={"limits": used})
    return done


async def make_key(asked: Asked, wanted: NewKey) -> tuple[str, Key]:
    """A key and its record. The key is in no store, no log and no audit: whoever asked has to keep it."""
    control = control_of(asked)
    fields: dict[str, Any] = {"caller": wanted.caller}
    for field in ("user", "agent", "departments", "tags", "params"):
        if told := getattr(wanted, field):
            fields[field] = tuple(told) if isinstance(told, list) else told
    if wanted.lasts:
        fields["expires_at_ms"] = asked.now_ms + _length_ms(wanted.lasts)
    try:
        return await control.new_key(**fields, actor=actor_of(asked), reason=wanted.reason)
    except ConfigurationError as error:
        raise _malformed(error, fields) from None


async def rotate(asked: Asked, name: str, *, overlap: str, reason: str) -> tuple[str, Key]:
    control = control_of(asked)
    try:
        return await control.rotate_key(name, overlap=overlap, actor=actor_of(asked), reason=reason)
    except NotThere:
        raise ProblemError(404, "There is no such key.") from None
    except ConfigurationError as error:
        raise _malformed(error, {"overlap": overlap}) from None


async def revoke(asked: Asked, name: str, *, reason: str) -> None:
    control = control_of(asked)
    try:
        await control.revoke_key(name, actor=actor_of(asked), reason=reason)
    except NotThere:
        raise ProblemError(404, "There is no such key.") from None


def field_in(message: str, known: Mapping[str, Any]) -> str:
    """The field that a message is about: one that it names before a colon, else one that was sent and that it names."""
    text = re.sub(r"'[^']*'", "", message)
    for word in _NAMED.findall(text):
        if word in known or word in _FIELDS:
            return str(word)
    words = _WORD.findall(text)
    return next((word for fields in (known, _FIELDS) for word in words if word in fields), "body")


def _malformed(error: ConfigurationError, value: Mapping[str, Any]) -> ProblemError:
    return ProblemError(422, str(error), field=field_in(str(error), value))


async def _conflict(
    control: Control, kind: Kind, name: str, value: Mapping[str, Any] | None, conflict: Conflict
) -> ProblemError:
    entry = (await control.state()).of(kind).get(name)
    return ProblemError(
        409,
        str(conflict),
        current=None if entry is None else shown_value(entry.value),
        version=0 if entry is None else entry.version,
        yours=value,
    )


def _length_ms(text: str) -> int:
    try:
        return duration_ms(text, name="lasts")
    except ConfigurationError as error:
        raise ProblemError(422, str(error), field="lasts") from None
