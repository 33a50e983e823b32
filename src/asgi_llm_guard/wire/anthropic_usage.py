"""What a message of Anthropic reports to have used, from reports that replace each other field by field.

Source: https://platform.claude.com/docs/en/api/messages, and the types of anthropic 2.11 for Python (2026-11).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from asgi_llm_guard.usage import Usage
from asgi_llm_guard.wire.shape import count_of, items, name_of, pick, within

__all__ = ["Report"]

_COUNTS: Final = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class Report:
    """The last of each field that was believable. A message of tools that run at the provider raises its counts."""

    __slots__ = ("_counts", "_iterations", "_long", "_searches", "_short", "_speed", "_thinking", "_tier")

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._short: int | None = None
        self._long: int | None = None
        self._thinking: int | None = None
        self._searches: int | None = None
        self._tier: str | None = None
        self._speed: str | None = None
        self._iterations: object = None

    def update(self, report: object, *, output: bool = True) -> None:
        """Take what the report has. `output`: what it says of the output counts."""
        if report is None:
            return
        for name in _COUNTS:
            count = count_of(pick(report, name))
            if count is not None and (output or name != "output_tokens"):
                self._counts[name] = count
        written = pick(report, "cache_creation")
        if written is not None:
            self._short = count_of(pick(written, "ephemeral_5m_input_tokens"))
            self._long = count_of(pick(written, "ephemeral_1h_input_tokens"))
        if (
            thinking := count_of(pick(pick(report, "output_tokens_details"), "thinking_tokens"))
        ) is not None and output:
            self._thinking = thinking
        if (searches := count_of(pick(pick(report, "server_tool_use"), "web_search_requests"))) is not None:
            self._searches = searches
        self._tier = name_of(pick(report, "service_tier")) or self._tier
        self._speed = name_of(pick(report, "speed")) or self._speed
        self._iterations = pick(report, "iterations") or self._iterations

    def usage(self, model: str | None) -> Usage | None:
        """The counts in inclusive form; `None` when they tell neither input nor output.

        Input is the sum of what was read, what was found in the cache and what was written to it.
        """
        main = _sums(self._counts, self._short, self._long)
        if main.entered is None and main.written is None:
            return None
        tier = "fast" if self._speed == "fast" else self._tier
        extra: tuple[Usage, ...] = ()
        if self._iterations is not None:
            main, extra = _apart(main, self._iterations, tier)
            if (main.found or 0) + (main.stored or 0) > (main.entered or 0):
                main = main._replace(found=None, stored=None, stored_1h=None)
        return Usage(
            input_tokens=main.entered,
            output_tokens=main.written,
            cache_read_tokens=main.found,
            cache_write_tokens=main.stored,
            cache_write_1h_tokens=main.stored_1h,
            reasoning_tokens=within(self._thinking, main.written),
            web_searches=self._searches,
            service_tier=tier,
            model=model,
            extra=extra,
        )


class _Sums(NamedTuple):
    """Counts in inclusive form. `None`: not known."""

    entered: int | None
    written: int | None
    found: int | None
    stored: int | None
    stored_1h: int | None

    def plus(self, other: _Sums) -> _Sums:
        """Both together; parts that only one knows are at least that."""
        sums = _Sums(
            *[
                None if one is None and two is None else count_of((one or 0) + (two or 0))
                for one, two in zip(self, other, strict=True)
            ]
        )
        # What has not been told yet is not told by what the other used.
        return sums._replace(
            entered=sums.entered if self.entered is not None else None,
            written=sums.written if self.written is not None else None,
        )

    def minus(self, other: _Sums) -> _Sums:
        """What is left without the other, which is a part."""
        return _Sums(*[None if one is None else max(one - (two or 0), 0) for one, two in zip(self, other, strict=True)])


_NOTHING: Final = _Sums(0, 0, None, None, None)


def _sums(counts: dict[str, int], short: int | None, long: int | None) -> _Sums:
    entered, stored = counts.get("input_tokens"), counts.get("cache_creation_input_tokens")
    found = counts.get("cache_read_input_tokens")
    if stored is None and (short is not None or long is not None):
        stored = count_of((short or 0) + (long or 0))
    if entered is not None:
        entered = count_of(entered + (stored or 0) + (found or 0))
    if entered is None:
        found = stored = None
    if long and stored is not None:
        long = max(stored - (short or 0), 0)  # what was written since is taken for the dearer kind
    return _Sums(entered, counts.get("output_tokens"), found, stored, within(long, stored))


def _apart(main: _Sums, iterations: object, tier: str | None) -> tuple[_Sums, tuple[Usage, ...]]:
    """The counts of the answering model, and those of others.

    The counts of a message leave out what it took to compact its context, which the same model did: it is added.
    An advisor and the model that answered in place of the one asked are billed at their own prices. Whether the
    message's counts have them in them is told by what adds up; where nothing does they are taken as left out,
    which charges rather too much.
    """
    compacted = own = _NOTHING
    others: dict[str, dict[str, _Sums]] = {"advisor_message": {}, "fallback_message": {}}
    for iteration in items(iterations):
        kind = pick(iteration, "type")
        sums = _of_iteration(iteration)
        if sums.entered is None or sums.written is None:
            continue
        model = name_of(pick(iteration, "model"))
        if kind == "compaction":
            compacted = compacted.plus(sums)
        elif kind in ("advisor_message", "fallback_message") and model is not None:
            models = others[str(kind)]
            models[model] = models.get(model, _NOTHING).plus(sums)
        else:
            own = own.plus(sums)
    advised, served = (_total(others[kind]) for kind in ("advisor_message", "fallback_message"))
    for inside, alone in ((advised.plus(served), served != _NOTHING), (served, True), (advised, False)):
        if _adds_up(main, own.plus(inside)) or (alone and _adds_up(main, inside)):
            main = main.minus(inside)
            break
    extra = tuple(
        Usage(
            input_tokens=sums.entered,
            output_tokens=sums.written,
            cache_read_tokens=sums.found,
            cache_write_tokens=sums.stored,
            cache_write_1h_tokens=sums.stored_1h,
            service_tier=tier,
            model=model,
        )
        for models in others.values()
        for model, sums in models.items()
    )
    return main.plus(compacted), extra


def _of_iteration(iteration: object) -> _Sums:
    written = pick(iteration, "cache_creation")
    return _sums(
        {name: count for name in _COUNTS if (count := count_of(pick(iteration, name))) is not None},
        count_of(pick(written, "ephemeral_5m_input_tokens")),
        count_of(pick(written, "ephemeral_1h_input_tokens")),
    )


def _total(models: dict[str, _Sums]) -> _Sums:
    total = _NOTHING
    for sums in models.values():
        total = total.plus(sums)
    return total


def _adds_up(one: _Sums, other: _Sums) -> bool:
    return one[:2] == other[:2] != _NOTHING[:2]
