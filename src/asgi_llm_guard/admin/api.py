"""The API: the same reading and changing as the pages, as JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar, get_args

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from asgi_llm_guard.admin import administer, gathered, live
from asgi_llm_guard.admin.asked import Asked, ProblemError, converted, json_answer
from asgi_llm_guard.admin.bodies import (
    AuditRow,
    BudgetRow,
    Change,
    Ended,
    EntryRow,
    HealthRow,
    KeyMade,
    KeyRow,
    NewKey,
    OpenCallRow,
    RefusalCountRow,
    Refusals,
    ResetRow,
    SessionRow,
    UsageAnswer,
    UsageGroup,
)
from asgi_llm_guard.admin.budgets import Budget, budget_of
from asgi_llm_guard.admin.kinds import EditedKind
from asgi_llm_guard.admin.shown import dollars
from asgi_llm_guard.control import AuditQuery
from asgi_llm_guard.control.data import shown as shown_value
from asgi_llm_guard.control.state import Entry
from asgi_llm_guard.control.values import Kind
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.ledger import Amounts, Dimension, NotKeptError, RefusalQuery, UsageQuery, UsageRow

__all__ = [
    "audit",
    "calls",
    "entry_get",
    "entry_list",
    "entry_put",
    "entry_remove",
    "health",
    "keys",
    "keys_new",
    "keys_revoke",
    "keys_rotate",
    "limits",
    "raises_end",
    "raises_new",
    "refusals",
    "reset",
    "sessions",
    "stops_end",
    "stops_new",
    "temporary",
    "usage",
]

Handler = Callable[[Asked], Awaitable[Response]]
T = TypeVar("T")

_DAY_MS: Final = 86_400_000
_MOST_MS: Final = 253_402_300_799_999
_MOST_REASON: Final = 500
_MOST_COUNTS: Final = 10_000


# ------------------------------------------------------------------------------------- reading


async def usage(asked: Asked) -> Response:
    ledger = asked.desk.ledger
    if ledger is None:
        raise _no_ledger()
    since_ms, until_ms = _period(asked)
    by = [part for part in asked.query.get("by", "").split(",") if part]
    where = {name[6:]: value for name, value in asked.query.items() if name.startswith("where.")}
    for name in by:
        if name not in get_args(Dimension):
            raise ProblemError(422, f"by: expected some of {', '.join(get_args(Dimension))}.", field="by")
    query = _checked(
        lambda: UsageQuery(
            since_ms=since_ms,
            until_ms=until_ms,
            by=tuple(by),  # type: ignore[arg-type]  # checked above
            where=where,
            tz=asked.query.get("tz") or asked.desk.options.tz,
            limit=_number(asked, "limit", 1000, 1, 10_000),
        ),
        "tz",
    )
    try:
        report = await ledger.usage(query)
    except NotKeptError as error:
        raise ProblemError(422, str(error), field="since_ms") from None
    return json_answer(
        UsageAnswer(
            since_ms=since_ms,
            until_ms=until_ms,
            tz=query.tz,
            by=by,
            rows=[_group(row) for row in report.rows],
            total=_group(UsageRow((), report.total)),
        )
    )


async def limits(asked: Asked) -> Response:
    scope = asked.query.get("scope")
    if scope is None:
        return json_answer([_budget(each) for each in (await gathered.budgets(asked.desk))[0]])
    try:
        found = await asked.desk.guard.meters_of(
            scope, asked.query.get("subject", ""), caller=asked.query.get("caller") or None
        )
    except ConfigurationError as error:
        raise ProblemError(422, str(error), field="scope") from None
    rows = [budget_of(meter, reading, asked.now_ms) for meter, reading in found]
    return json_answer([_budget(each) for each in rows if each is not None])


async def calls(asked: Asked) -> Response:
    found = await asked.desk.open_calls()
    if found is None:
        raise ProblemError(409, "This storage cannot list open calls.")
    rows = []
    for call in found:
        draft = call.draft
        money = [hold.amount for hold in call.held if hold.unit == "nanousd"]
        rows.append(
            OpenCallRow(
                call_id=call.call_id,
                at_ms=call.at_ms,
                caller=None if draft is None else draft.caller,
                user=None if draft is None else draft.user,
                session=None if draft is None else draft.session,
                agent=None if draft is None else draft.agent,
                departments=[] if draft is None else list(draft.departments),
                model=None if draft is None else draft.model,
                held_usd=dollars(max(money)) if money else None,
            )
        )
    return json_answer(rows)


async def sessions(asked: Asked) -> Response:
    found = (await live.live_sessions(asked.desk)).sessions
    return json_answer(
        [
            SessionRow(
                caller=each.caller,
                session=each.session,
                agent=each.agent,
                departments=list(each.departments),
                first_ms=each.first_ms,
                last_ms=each.last_ms,
                calls=each.calls,
                cost_usd=dollars(each.cost_nanousd),
                open=each.open,
            )
            for each in found
        ]
    )


async def refusals(asked: Asked) -> Response:
    since_ms, until_ms = _period(asked)
    policy = asked.query.get("policy") or None
    counts, next_until_ms = [], None
    if asked.desk.ledger is not None:
        query = _checked(
            lambda: RefusalQuery(since_ms=since_ms, until_ms=until_ms, policy=policy, limit=_MOST_COUNTS + 1), "policy"
        )
        found = await asked.desk.ledger.refusals(query)
        if len(found) > _MOST_COUNTS:  # whole hours, of which each is shorter than that
            next_until_ms = found[-1].hour_ms + 1
            found = [each for each in found if each.hour_ms >= next_until_ms]
        counts = [
            RefusalCountRow(
                hour_ms=each.hour_ms,
                policy=each.policy,
                scope=each.scope,
                code=each.code,
                route=each.route,
                count=each.count,
            )
            for each in found
        ]
    latest = list(asked.desk.recent.latest(_number(asked, "limit", 50, 1, 500), policy=policy))
    return json_answer(Refusals(counts=counts, next_until_ms=next_until_ms, latest=latest))


async def audit(asked: Asked) -> Response:
    control = administer.control_of(asked)
    query = _checked(
        lambda: AuditQuery(
            actor=asked.query.get("actor") or None,
            target=asked.query.get("target") or None,
            before=_number(asked, "before", _MOST_MS, 0, _MOST_MS),
            limit=_number(asked, "limit", 100, 1, 1_000),
        ),
        "target",
    )
    return json_answer(
        [
            AuditRow(
                seq=entry.seq,
                at_ms=entry.at_ms,
                verb=entry.verb,
                target=entry.target,
                name=entry.actor,
                role=entry.role,
                address=entry.address,
                reason=entry.reason,
                refused=entry.refused,
                old=None if entry.old is None else msgspec.json.decode(entry.old),
                new=None if entry.new is None else msgspec.json.decode(entry.new),
            )
            for entry in await control.audit(query)
        ]
    )


async def health(asked: Asked) -> Response:
    told = asked.desk.guard.health()
    return json_answer(HealthRow(ready=bool(told["ready"]), storage=str(told["storage"]), details=dict(told)))


# ------------------------------------------------------------------------------------- entries


def entry_list(kind: EditedKind) -> Handler:
    async def run(asked: Asked) -> Response:
        state = await administer.control_of(asked).state()
        return json_answer([_entry(name, entry) for name, entry in state.of(kind.kind).items()])

    return run


def entry_get(kind: EditedKind) -> Handler:
    async def run(asked: Asked) -> Response:
        name = asked.params["name"]
        entry = (await administer.control_of(asked).state()).of(kind.kind).get(name)
        if entry is None:
            raise ProblemError(404, f"There is no such {kind.one}.")
        return json_answer(_entry(name, entry))

    return run


def entry_put(kind: EditedKind) -> Handler:
    async def run(asked: Asked) -> Response:
        body: Change = asked.body
        try:
            value = converted(body.value, kind.body)
        except ProblemError as problem:
            problem.field = f"value.{problem.field}" if problem.field != "body" else "value"
            raise
        fields = {name: told for name in value.__struct_fields__ if (told := getattr(value, name)) is not UNSET}
        fields = {name: str(told) if isinstance(told, float) else told for name, told in fields.items()}
        name = asked.params["name"]
        expected = None if body.expected is UNSET else body.expected
        state = await administer.put(asked, kind.kind, name, fields, reason=body.reason, expected=expected)
        return json_answer(_entry(name, state.of(kind.kind)[name]))

    return run


def entry_remove(kind: EditedKind) -> Handler:
    async def run(asked: Asked) -> Response:
        expected = _number(asked, "expected", -1, 0, 2**53 - 1)
        await administer.remove(
            asked,
            kind.kind,
            asked.params["name"],
            reason=_reason(asked),
            expected=None if expected < 0 else expected,
        )
        return Response(status_code=204)

    return run


def temporary(kind: Kind) -> Handler:
    """The raises or stops that there are."""

    async def run(asked: Asked) -> Response:
        state = await administer.control_of(asked).state()
        return json_answer([_entry(name, entry) for name, entry in state.of(kind).items()])

    return run


# ------------------------------------------------------------------------------------- changes


async def stops_new(asked: Asked) -> Response:
    name, here = await administer.stop(asked, asked.body)
    return json_answer(Ended(id=name, ended_here=here), 201)


async def stops_end(asked: Asked) -> Response:
    await administer.end(asked, "stop", asked.params["name"], reason=_reason(asked))
    return Response(status_code=204)


async def raises_new(asked: Asked) -> Response:
    name = await administer.raise_limit(asked, asked.body)
    return json_answer({"id": name}, 201)


async def raises_end(asked: Asked) -> Response:
    await administer.end(asked, "raise", asked.params["name"], reason=_reason(asked))
    return Response(status_code=204)


async def reset(asked: Asked) -> Response:
    return json_answer(
        [
            ResetRow(
                policy=each.policy,
                scope=each.scope,
                subject=each.subject,
                unit=each.unit.value,
                used=each.used,
            )
            for each in await administer.reset(asked, asked.body)
        ]
    )


async def keys(asked: Asked) -> Response:
    state = await administer.control_of(asked).state()
    now_ms = asked.now_ms
    return json_answer(
        [
            KeyRow(id=name, version=entry.version, active=entry.value.is_active(now_ms), value=shown_value(entry.value))
            for name, entry in state.keys.items()
        ]
    )


async def keys_new(asked: Asked) -> Response:
    body: NewKey = asked.body
    secret, key = await administer.make_key(asked, body)
    return json_answer(KeyMade(secret=secret, id=key.id), 201)


async def keys_rotate(asked: Asked) -> Response:
    secret, key = await administer.rotate(
        asked, asked.params["name"], overlap=asked.body.overlap, reason=asked.body.reason
    )
    return json_answer(KeyMade(secret=secret, id=key.id), 201)


async def keys_revoke(asked: Asked) -> Response:
    await administer.revoke(asked, asked.params["name"], reason=_reason(asked))
    return Response(status_code=204)


# --------------------------------------------------------------------------------------- parts


def _entry(name: str, entry: Entry[Any]) -> EntryRow:
    return EntryRow(name=name, version=entry.version, value=shown_value(entry.value))


def _group(row: UsageRow) -> UsageGroup:
    sums: Amounts = row.amounts
    return UsageGroup(
        key=list(row.key),
        records=sums.records,
        calls=sums.calls,
        cost_usd=dollars(sums.cost_nanousd),
        unpriced=sums.unpriced,
        tokens=sums.tokens,
        input_tokens=sums.input_tokens,
        output_tokens=sums.output_tokens,
        estimated=sums.estimated,
        cached=sums.cached,
        errors=sums.errors,
    )


def _budget(budget: Budget) -> BudgetRow:
    def told(amount: int) -> str:
        return dollars(amount) if budget.unit == "nanousd" else str(amount)

    return BudgetRow(
        policy=budget.policy,
        scope=budget.scope,
        subject=budget.subject,
        unit="usd" if budget.unit == "nanousd" else budget.unit,
        window=budget.window,
        limit=told(budget.limit),
        used=told(budget.used),
        held=told(budget.held),
        remaining=told(budget.remaining),
        forecast=None if budget.forecast is None else told(budget.forecast),
        resets_at_ms=budget.resets_at_ms,
        enforce=budget.enforce,
    )


def _period(asked: Asked) -> tuple[int, int]:
    now_ms = asked.now_ms
    since_ms = _number(asked, "since_ms", max(0, now_ms - _DAY_MS), 0, _MOST_MS)
    until_ms = _number(asked, "until_ms", max(now_ms, since_ms) + 1, 0, _MOST_MS)
    if until_ms <= since_ms:
        raise ProblemError(422, "until_ms: must be after since_ms.", field="until_ms")
    return since_ms, until_ms


def _number(asked: Asked, name: str, default: int, least: int, most: int) -> int:
    text = asked.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise ProblemError(422, f"{name}: expected a whole number from {least} to {most}.", field=name)
    return int(text)


def _reason(asked: Asked) -> str:
    """Why something is taken away, where it is said."""
    reason = asked.query.get("reason", "")
    if len(reason) > _MOST_REASON:
        raise ProblemError(422, f"reason: expected at most {_MOST_REASON} characters.", field="reason")
    return reason


def _checked(make: Callable[[], T], field: str) -> T:
    try:
        return make()
    except ConfigurationError as error:
        raise ProblemError(422, str(error), field=administer.field_in(str(error), {field: None})) from None


def _no_ledger() -> ProblemError:
    return ProblemError(
        409,
        "No ledger is configured, so nothing is known of past usage: Guard(ledger='postgresql://…') or a SQLite storage.",
    )
