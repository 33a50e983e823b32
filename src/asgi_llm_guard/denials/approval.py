"""The link of a refusal to where more may be asked for."""

from __future__ import annotations

from typing import Final
from urllib.parse import quote

import msgspec

from asgi_llm_guard.decision import Code, Denied
from asgi_llm_guard.errors import ConfigurationError

__all__ = ["check_approval_url", "with_approval"]

_MOST_CHARACTERS: Final = 200

_GRANTABLE: Final[frozenset[Code]] = frozenset(
    {
        "session_iterations_exhausted",
        "quota_exceeded",
        "budget_exhausted",
        "request_exceeds_budget",
        "model_not_allowed",
        "model_unpriced",
        "feature_not_allowed",
    }
)
"""What somebody may be asked to grant; what time or another request mends is not."""


def check_approval_url(template: str | None) -> str | None:
    """`template`, if links can be made of it: `https://ask.example/more?policy={policy}&scope={scope}&subject={subject}`.

    Raises:
        ConfigurationError: no http(s) URL, or other names in braces.
    """
    if template is None:
        return None
    try:
        made = template.format(policy="p", code="c", scope="s", subject="t")
    except (AttributeError, IndexError, KeyError, ValueError):
        made = ""
    if not isinstance(template, str) or not made.startswith(("https://", "http://")):
        raise ConfigurationError(
            "approval_url: expected a URL that may have {policy}, {code}, {scope} and {subject} in it, "
            f"got {template!r}"
        )
    return template


def with_approval(denied: Denied, template: str) -> Denied:
    """The same refusal with the link to where more may be asked for, if it is of a kind that can be granted."""
    if denied.code not in _GRANTABLE:
        return denied
    names = {"policy": denied.policy, "code": denied.code, "scope": denied.scope, "subject": denied.subject}
    url = template.format(
        **{name: quote(value[:_MOST_CHARACTERS], safe="", errors="replace") for name, value in names.items()}
    )
    return msgspec.structs.replace(denied, approval_url=url)
