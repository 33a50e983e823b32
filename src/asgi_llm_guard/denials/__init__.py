"""From what refused to what is answered: storage answers and policies' own refusals become one `Denied`.

Pure: no I/O, no clock, no randomness of its own. `docs/denials.md` shows the table to users.

Rule 1: the first refusing claim, in the order of the policies, names the policy, the code and the status.

Rule 2: `Retry-After` is the longest wait over *all* refusing claims. If one of them can never fit, or has no
reset, there is none. A wait is never understated: it is rounded up, and jitter only adds to it.

Rule 3: `retry` promises that the same request may pass after `Retry-After`: every refusing claim is a rate, a
slot, or an amount that calls in flight hold, and the wait is at most `RETRYABLE_S`.

Rule 4: limits, counts and names are shown only for scopes that the caller owns, or with `disclose="all"`.

    denied.py     START HERE: the decision
    receipts.py   which claims refuse, how long, and what would fit
    statuses.py   HTTP statuses
    wording.py    messages
    approval.py   the link to where more may be asked for
"""

from asgi_llm_guard.denials.denied import deny, refuse, together
from asgi_llm_guard.denials.statuses import check_statuses

__all__ = ["check_statuses", "deny", "refuse", "together"]
