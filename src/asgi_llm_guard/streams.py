"""Streamed answers while they pass: metered, held for, cut and timed.

Rule 1: a stream is settled at its true end, by what it reports; before that, by what was counted of it.

Rule 2: a stream that lasts longer than was expected holds more, before it has used up what it holds. What is held
grows by a quarter at a time, so that there are few trips, up to what the model can give.

Rule 3: text tells less than tokens do. How near a stream has come to what it holds is taken from what it reports
while it runs, where its dialect does that; else from its text, at `NEAR_BYTES` for a token. It has surely used up
what it holds at `SURE_BYTES` for a token, and is cut only then. A stream whose request sets its own limit, and is
held for in full, is never cut: its provider ends it.

Rule 4: a cut comes between two events, with the error event of the dialect.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from asgi_llm_guard.decision import Denied, Refusal
from asgi_llm_guard.errors import ContextError
from asgi_llm_guard.stream_rules import StreamRules
from asgi_llm_guard.wire.base import Answer, Meter

if TYPE_CHECKING:
    from asgi_llm_guard.active_call import ActiveCall
    from asgi_llm_guard.context import Call

__all__ = ["NEAR_BYTES", "SURE_BYTES", "StreamGuard", "StreamRules"]

NEAR_BYTES: Final = 3
"""Few texts have fewer bytes for each token; so a stream has most likely not used more than this tells."""
SURE_BYTES: Final = 8
"""Few texts have more bytes for each token, on average over an answer; so a stream has used at least what this tells."""

_NEVER: Final = 1 << 62
_LEAST_GROWTH: Final = 256


class StreamGuard:
    """One streamed answer on its way to the client.

    Args:
        call: what holds for it. If another one has taken its hold over, the stream is neither grown nor cut.
        meter: reads it.
        rules: what holds for it.
        ending: the last event of a stream that is refused to go on.
        time: seconds of a clock that does not step.
    """

    __slots__ = (
        "_at",
        "_began",
        "_call",
        "_ending",
        "_gaps",
        "_last",
        "_reports",
        "_time",
        "_timed",
        "denied",
        "fed",
        "meter",
        "rules",
        "wants_growth",
    )

    def __init__(
        self,
        call: ActiveCall,
        meter: Meter,
        rules: StreamRules,
        ending: Callable[[Denied], bytes],
        *,
        time: Callable[[], float] = clock.monotonic,
    ) -> None:
        self.meter = meter
        self.rules = rules
        self.denied: Denied | None = None
        """Why it was ended, if it was."""
        self.wants_growth = False
        """`grow` has to be called before more is forwarded."""
        self.fed = False
        """Something has come."""
        self._call = call
        self._ending = ending
        self._time = time
        self._timed = rules.timed
        self._began = self._last = time() if self._timed else 0.0
        self._reports = False
        self._gaps = call.gaps() if call.call is not None and call.call.stream else None
        self._at = _NEVER
        """From so many bytes of text on, look closer."""
        if call.call is not None and self._may_grow(call.call):
            self._at = 1

    @property
    def ended(self) -> bool:
        """The client has got the last event, and gets nothing more."""
        return self.meter.ended

    # --------------------------------------------------------------------------------- pass

    def feed(self, chunk: bytes) -> bytes:
        """What to forward of a chunk; never raises."""
        self.fed = True
        if self._gaps is not None and chunk:
            self._gaps.part()
        forward = self.meter.feed(chunk)
        if self._timed:
            self._last = self._time()
        if self.meter.text_bytes >= self._at and not self.wants_growth:
            self._look()
        return forward

    def first_part(self) -> None:
        """Something of it has come. Later calls change nothing."""
        self._call.first_part()

    def finish(self) -> bytes:
        """The stream has come to its end by itself: what is still to be forwarded."""
        return self.meter.finish()

    def answer(self) -> Answer | None:
        """What was seen of it; `None`: nothing has come."""
        return self.meter.answer() if self.fed else None

    @property
    def tells_nothing(self) -> bool:
        """No usage was reported in what was seen of it."""
        answer = self.answer()
        return answer is None or answer.usage is None

    def end(self, error: BaseException | None = None, *, complete: bool = False) -> None:
        """End the call with what was counted. `complete`: the stream has come to its end."""
        answer = self.answer()
        if answer is not None:
            self._call.answered(answer)
        self._call.end(error, complete=complete or (answer is not None and answer.finished))

    # --------------------------------------------------------------------------------- grow

    async def grow(self) -> bytes:
        """Hold more for a stream that `wants_growth`. What to forward: nothing, or the end of it, if it is cut."""
        self.wants_growth = False
        call = self._call
        held = call.call
        if held is None or self.denied is not None:
            self._at = _NEVER
            return b""
        try:
            denied = await self._hold_more(call, held)
        except ContextError:  # it has ended, or a call inside it has taken over
            self._at = _NEVER
            return b""
        if denied is None:
            self._mark(call.call)
            return b""
        if not self.rules.cut:
            self._at = _NEVER  # it was refused once: what more it uses is debited
            return b""
        if self._used_up(held):
            self.denied = denied
            self._at = _NEVER
            return self.meter.cut(self._ending(denied))
        self._at = self.meter.text_bytes + 1 if self._reports else held.output_tokens * SURE_BYTES
        return b""

    async def _hold_more(self, call: ActiveCall, held: Call) -> Denied | None:
        describer = self._call.admission.engine.describer
        tokens = max(held.output_tokens, self._near())
        # One that is longer than its model's longest answer tells that this is not known rightly.
        capped = not self._is_full(held)
        more = describer.longer(held, max(tokens + tokens // 4, tokens + _LEAST_GROWTH), capped=capped)
        denied = await call.grow(more)
        if denied is None or not denied.fits_max_tokens:
            return denied
        fits = denied.fits_max_tokens * held.choices
        if fits <= max(held.output_tokens, self._sure()):
            return denied
        return await call.grow(describer.longer(held, fits, capped=capped))

    def _may_grow(self, call: Call) -> bool:
        return call.max_output_tokens is None or not self._is_full(call)

    def _is_full(self, call: Call) -> bool:
        """It holds for the longest answer that the request allows, or that the model gives."""
        longest = self._call.admission.engine.describer.longest(call)
        return longest is not None and call.output_tokens >= longest

    def _look(self) -> None:
        call = self._call.call
        if call is None or self.meter.answer().finished:
            self._at = _NEVER
        elif self._used_up(call) if self._is_full(call) else 4 * self._near() >= 3 * call.output_tokens:
            self.wants_growth = True
        else:
            self._mark(call)

    def _mark(self, call: Call | None) -> None:
        """Look again when three quarters of what is held may be used; or all of it is, if it should be enough."""
        if call is None or not self._may_grow(call):
            self._at = _NEVER
        elif self._reports:
            self._at = self.meter.text_bytes  # reasoning may be reported without any text
        else:
            near = call.output_tokens * SURE_BYTES if self._is_full(call) else call.output_tokens * 3 * NEAR_BYTES // 4
            self._at = max(self.meter.text_bytes + 1, near)

    def _reported(self) -> int | None:
        usage = self.meter.answer().usage
        tokens = usage.output_tokens if usage is not None else None
        if tokens:
            self._reports = True
        return tokens or None

    def _near(self) -> int:
        reported = self._reported()
        return self.meter.text_bytes // NEAR_BYTES if reported is None else reported

    def _sure(self) -> int:
        reported = self._reported()
        return self.meter.text_bytes // SURE_BYTES if reported is None else reported

    def _used_up(self, held: Call) -> bool:
        return self._sure() >= held.output_tokens

    # -------------------------------------------------------------------------------- halted

    def halt(self, denied: Denied) -> bytes:
        """It is ended from outside. What to forward at once: its last event, unless another one has begun; then that
        comes with what is fed next, or with `finish`. A stream that has just come to its end stays as it is."""
        self._at = _NEVER
        self.wants_growth = False
        if self.denied is not None or self.ended or self.meter.answer().finished:
            return b""
        self.denied = denied
        return self.meter.cut(self._ending(denied))

    def last_event(self, denied: Denied) -> bytes:
        """As `halt`, where what is forwarded is made of whole events elsewhere."""
        self.denied = self.denied or denied
        return self._ending(denied)

    # ---------------------------------------------------------------------------- deadlines

    def wait_s(self, now: float | None = None) -> float | None:
        """How long until the first deadline, in seconds, 0 if it has passed; `None`: there is none."""
        if not self._timed:
            return None
        rules, now = self.rules, self._time() if now is None else now
        ends = []
        if rules.idle_s is not None:
            ends.append(self._last + rules.idle_s)
        if rules.total_s is not None:
            ends.append(self._began + rules.total_s)
        return max(0.0, min(ends) - now)

    def expire(self) -> bytes:
        """A deadline has passed: what to forward, with which the stream ends for the client."""
        rules, now = self.rules, self._time()
        total = rules.total_s is not None and now - self._began >= rules.total_s
        message = (
            f"The answer was ended: it has lasted {rules.total_s:g} seconds, the longest that this service allows."
            if total
            else f"The answer was ended: nothing has come for {rules.idle_s:g} seconds."
        )
        self._at = _NEVER
        self.wants_growth = False
        if self.ended:
            return b""
        call = self._call.call
        refusal = Refusal(policy="streams", code="stream_timeout", message=message)
        self.denied = self._call.admission.engine.refused(self._call.admission.context, call, refusal)
        forward = self.meter.cut(self._ending(self.denied))
        return forward if self.ended else forward + self.meter.finish()
