"""Everything this package raises.

    GuardError
    ├── ConfigurationError    a setting is wrong; raised while things are built, never at request time
    ├── ContextError          there is no admission, or no guard, where one is needed
    ├── IdentityError         a request's ids or credentials are malformed or unknown (`identity.base`)
    ├── BodyError             a request's body is refused (`wire.peek`)
    ├── StorageError          the store did not answer, or its answer is unknown
    │   └── DataLost          the store answers, but what it knew is gone
    ├── Conflict, NotThere    administration data are not as they were seen (`control.changes`)
    ├── NotKeptError          a report needs records that retention has removed (`ledger.values`)
    ├── NotInstalledError     an optional dependency is missing; names the extra to install
    └── LimitExceeded         a call was refused in code; carries the decision as `.denied`

A refusal inside the guard is a value (`decision.Denied`), not an exception. It becomes
`LimitExceeded` only where a refusal has to travel through the user's code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asgi_llm_guard.decision import Denied

__all__ = [
    "ConfigurationError",
    "ContextError",
    "DataLost",
    "GuardError",
    "LimitExceeded",
    "NotInstalledError",
    "StorageError",
]


class GuardError(Exception):
    """The base of every error of this package."""


class ConfigurationError(GuardError, ValueError):
    """A setting is wrong. The message names the setting, the value seen and what is allowed."""


class ContextError(GuardError, RuntimeError):
    """There is no admission, or no guard, where one is needed."""


class StorageError(GuardError):
    """The store failed, or its outcome is unknown. Never to be taken for a refusal."""

    sent: bool = True
    """`False`: the operation surely did not reach the store, so there is nothing to take back."""


class DataLost(StorageError):  # noqa: N818 - what happened, as with `LimitExceeded`
    """The store answers, but it was flushed or rolled back. Nothing was taken; see `Guard(on_data_loss=...)`."""

    sent = False


class NotInstalledError(GuardError, ImportError):
    """An optional dependency is missing. The message names the extra that brings it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency: pip install 'asgi-llm-guard[{extra}]'")


class LimitExceeded(GuardError):  # noqa: N818 - the field's word for it, as in every limiter
    """A call was refused. `denied` says by which policy, what was asked, and when it resets."""

    def __init__(self, denied: Denied) -> None:
        super().__init__(denied.message)
        self.denied = denied
