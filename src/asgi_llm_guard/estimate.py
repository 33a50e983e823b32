r"""Upper bounds of a call's tokens, before it is made.

Text: no tokenizer in use emits more tokens than the text has UTF-8 bytes. Byte-level BPE starts from
bytes and only merges them; SentencePiece with byte fallback spends at most one token on each byte. Some
normalize the text first (NFKC, as an older one of Claude's does), which makes more of a few letters: one of
three bytes becomes 33. Those count by what they become. So
the length of the request's JSON bounds all the text in it: every byte of text takes at least one byte
of JSON, quotes and keys around it are bytes too, and an escape is never shorter than what it stands for
(`\u00e9` is 6 bytes for 2, `\ud83d\ude00` is 12 for 4, `\n` is 2 for 1).

Images, audio and files are not text: what they cost has nothing to do with their size as base64, and a
link to one is short. They count by the constants of `media.py`.

What a bound cannot cover, because it is not in the request: what hosted tools fetch (web search, file
search, code interpreter, MCP), and what linked files contain beyond `FILE_TOKENS`.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import TYPE_CHECKING, Final, Protocol, cast

import msgspec

from asgi_llm_guard.context import CacheWrites
from asgi_llm_guard.errors import NotInstalledError
from asgi_llm_guard.media import (
    FILE_TOKENS,
    IMAGE_MINI_TOKENS,
    IMAGE_ORIGINAL_TOKENS,
    IMAGE_TOKENS,
    PAGE_TOKENS,
    REQUEST,
    media_parts,
)
from asgi_llm_guard.money import MAX_AMOUNT

if TYPE_CHECKING:
    import tiktoken

__all__ = [
    "DEFAULT_OUTPUT_TOKENS",
    "FILE_TOKENS",
    "FRAMING_TOKENS",
    "HELD_TOKENS",
    "IMAGE_MINI_TOKENS",
    "IMAGE_ORIGINAL_TOKENS",
    "IMAGE_TOKENS",
    "PAGE_TOKENS",
    "TOOLS_TOKENS",
    "WEB_SEARCHES",
    "Body",
    "Counter",
    "Needs",
    "TiktokenCounter",
    "input_tokens",
    "message_needs",
    "message_tokens",
    "needs",
    "output_tokens",
    "text_tokens",
]

FRAMING_TOKENS: Final = 128
"""What a provider adds around the messages: role markers are covered by the JSON around each message; this
is for the start of the answer and a built-in system text.
Source: gpt-oss's harmony format, about 70 tokens; Llama 3.1's template, 25; OpenAI Chat, 3 (2026-11)."""

TOOLS_TOKENS: Final = 2_048
"""The instructions that a provider adds once a request has tools, hosted ones included.
Source: https://platform.claude.com/docs/en/agents-and-tools/tool-use/overview (up to 804 tokens, and 735 for
computer use, 700 for the text editor, 2026-11)."""

HELD_TOKENS: Final = 128_000
"""What the provider holds of the conversation (`previous_response_id`, `conversation`, `cachedContent`, a stored
prompt), where the model's context window is not given: an assumption."""

DEFAULT_OUTPUT_TOKENS: Final = 16_384
"""The output of one choice where neither the request, the policy nor the price book knows a limit: an assumption."""

WEB_SEARCHES: Final = 10
"""How often a hosted search tool is taken to search for one answer, where the request does not limit it: an
assumption. Source: Claude's web search, whose examples set `max_uses` to 5 and 10 (2026-11)."""

#: Names that say what a request has besides text, as each API writes them. They are looked for before
#: anything is decoded: one pass, and most bodies need no more.
_MARKS: Final = re.compile(
    rb'"(?=[iavfdpctwWoegs])'  # says nothing new, and passes over most quotes at once
    rb"(image|audio|input_audio|video|file|inline|document"
    rb'|previous_|conversation"|cached|prompt"'
    rb'|cache_control"|cache_?[pP]oint"|prompt_cache_options"|prompt_cache_retention"'
    rb'|tools"|functions"|tool_?[cC]onfig"|web_search_options"'
    rb'|(?:openrouter:|enterprise_?)?[wW]eb_?[sS]earch|google_?[sS]earch|search_parameters"|plugins")'
)
_TOOLS: Final = frozenset({b'tools"', b'functions"', b'toolConfig"', b'tool_config"', b'web_search_options"'})
_CACHES: Final = frozenset({b'cache_control"', b'cachePoint"', b'cache_point"', b'cachepoint"'})
_KEEPS: Final = frozenset({b'prompt_cache_options"', b'prompt_cache_retention"'})
_HARMLESS: Final = _TOOLS | _CACHES | _KEEPS
"""With no other marks, the bytes are the bound."""
_SOUNDS: Final = frozenset({b"audio", b"input_audio", b"video"})
_HELD_KEYS: Final = (
    "previous_response_id",
    "previous_interaction_id",
    "conversation",
    "cachedContent",
    "cached_content",
)
#: An escape of a letter that needs none, which could hide a name.
_HIDING: Final = re.compile(rb"\\u00[2-7]")


#: What is longer in NFKC than it was, with a few beside it that are not.
_GROWING: Final = re.compile(
    "["
    "\u00a8\u00af\u00b4-\u00be\u013f-\u0140\u0149\u01c4-\u01c6\u02d8-\u02dd\u0344\u037a\u0384-\u0385\u0587"
    "\u0675-\u0678\u0958-\u095f\u09dc-\u09df\u0a33-\u0a36\u0a59-\u0a5e\u0b5c-\u0b5d\u0e33\u0eb3\u0edc-\u0edd"
    "\u0f43\u0f4d\u0f52\u0f57\u0f5c\u0f69\u0f73-\u0f79\u0f81\u0f93\u0f9d\u0fa2\u0fa7\u0fac\u0fb9\u1fc1"
    "\u1fcd-\u1fcf\u1fdd-\u1fdf\u1fed-\u1fee\u2033-\u2037\u2057\u2150-\u215f\u2167\u2177\u2189\u222c-\u2230"
    "\u247d-\u2487\u2a0c\u2adc\u309b-\u309f\u30ff\u3200-\u3243\u327c-\u327d\u32c0-\u32cb\u32ff-\u3370"
    "\u337b-\u337f\u3389\u33a7-\u33a8\u33ae-\u33af\u33c2-\u33c6\u33d8\u33de-\u33fe\ufa6c\ufacf-\ufad7"
    "\ufb13-\ufb17\ufb1d-\ufb1f\ufb2a-\ufb4f\ufbdd\ufbea-\ufbfb\ufc00-\ufd3d\ufd50-\ufdc7\ufdf0-\ufdfc\ufe71"
    "\ufe77-\ufe7f\ufef5-\ufefc\U0001d15e-\U0001d164\U0001d1bb-\U0001d1c0\U0001f12a\U0001f200-\U0001f201"
    "\U0001f240-\U0001f248"
    "]"
)
#: The same where each is an escape in ASCII: those that become more than its six bytes.
_GROWING_ESCAPES: Final = re.compile(
    rb"\\u(0[fF]7[79]|203[47]|2057|22(?:2[dD]|30)|2[aA]0[cC]|321[dDeE]|33[0-9a-fA-F]{2}|[fF][dD][fF][0-9a-fA-F])"
)


class Body(Protocol):
    """A request's body, such as `wire.peek.BodyView`."""

    @property
    def body(self) -> bytes: ...


class Counter(Protocol):
    """Counts the tokens of text. For callers who want fewer refusals than the byte bound gives, and pay with CPU."""

    def count(self, text: bytes, /) -> int:
        """The tokens of a text in UTF-8. Called on the request path: be quick, and never below the truth."""
        ...


class TiktokenCounter:
    """Counts with one of OpenAI's encodings. Exact for OpenAI's models; no bound for anybody else's.

    `encoding`: a name, or a `tiktoken.Encoding`. A name needs its vocabulary, which tiktoken downloads or
    finds in `TIKTOKEN_CACHE_DIR`. A text of 100 KB takes 5 to 40 ms.

    Raises:
        NotInstalledError: tiktoken is not installed.
    """

    __slots__ = ("_encoding",)

    def __init__(self, encoding: str | tiktoken.Encoding = "o200k_base") -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise NotInstalledError("TiktokenCounter", "tiktoken") from error
        self._encoding = tiktoken.get_encoding(encoding) if isinstance(encoding, str) else encoding

    def count(self, text: bytes, /) -> int:
        """The tokens of a text; control tokens written out in it are plain text."""
        return len(self._encoding.encode_ordinary(text.decode("utf-8", "replace")))


def text_tokens(text: str | bytes | int) -> int:
    """The most tokens that a text can have: its UTF-8 bytes, or the number of them if that is given."""
    if isinstance(text, int):
        return text
    return len(text) if isinstance(text, bytes) or text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What a request may need besides output. Upper bounds."""

    input_tokens: int
    cache_writes: CacheWrites = "1h"
    may_have_audio: bool = True
    audio_ms: int = 0
    """Of recordings that are sent along."""
    web_searches: int = 0
    search_units: int = 0
    """Of a ranking: a query with 100 documents is one."""


def needs(
    request: Body | bytes,
    *,
    provider: str | None = None,
    model: str | None = None,
    window: int | None = None,
    counter: Counter | None = None,
) -> Needs:
    """What a request's JSON body may need.

    `provider`, `model`: tell who caches only what is marked for it, and images apart, which cost more with some.
    `window`: the model's context window, for requests that go on with what the provider holds. `counter`: counts
    the text in place of its bytes.

    A body that is not JSON counts by its bytes.
    """
    body = request if isinstance(request, bytes) else request.body
    name = (model or "").lower()
    tokens = FRAMING_TOKENS
    marks = set(_MARKS.findall(body))
    escapes = b"\\" in body and b"\\u" in body  # one byte is found far faster than two
    hiding = escapes and _HIDING.search(body) is not None
    writes = _cache_writes(body, marks, provider, name, hiding=hiding)
    if not marks.isdisjoint(_TOOLS):
        tokens += TOOLS_TOKENS
    ranks = b"document" in marks and b'"documents"' in body and b'"query"' in body
    if counter is None and (escapes or not body.isascii()):
        tokens += _growth(body)
    if not hiding and not ranks and marks <= _HARMLESS:
        tokens += len(body) if counter is None else counter.count(body)
        return Needs(input_tokens=tokens, cache_writes=writes, may_have_audio=False, web_searches=_asked(marks))
    root = _decode(body)
    goes_on = _goes_on(root)
    if goes_on:
        tokens += HELD_TOKENS if window is None else window
    parts = list(media_parts(root, name))
    tokens += sum(part.tokens for part in parts)
    inline = [text for part in parts for text in part.inline]
    if counter is None:
        tokens += len(body) - sum(map(text_tokens, inline))
    else:
        for text in inline:
            body = body.replace(text.encode("utf-8", "surrogatepass"), b"", 1)
        tokens += counter.count(body)
    sounds = not marks.isdisjoint(_SOUNDS) or any(part.kind in ("audio", "video") or not part.told for part in parts)
    return Needs(
        input_tokens=tokens,
        cache_writes=writes,
        may_have_audio=goes_on or hiding or root is None or sounds,
        audio_ms=sum(part.audio_ms for part in parts),
        web_searches=_web_searches(root),
        search_units=_search_units(root) if ranks else 0,
    )


def input_tokens(
    request: Body | bytes, *, model: str | None = None, window: int | None = None, counter: Counter | None = None
) -> int:
    """The most input tokens that a request's JSON body can have; the arguments as of `needs`."""
    return needs(request, model=model, window=window, counter=counter).input_tokens


def message_needs(
    messages: object,
    *,
    provider: str | None = None,
    model: str | None = None,
    window: int | None = None,
    counter: Counter | None = None,
) -> Needs:
    """What a call may need: of a text, of messages as Python values (lists, dicts, dataclasses, pydantic models), or
    of the keyword arguments of a call.

    Only the arguments of a call tell what is cached: of anything else it is not known.
    """
    if isinstance(messages, str):
        text = messages.encode("utf-8", "surrogatepass")
        tokens = FRAMING_TOKENS + (len(text) + _growth(text) if counter is None else counter.count(text))
        return Needs(input_tokens=tokens, may_have_audio=False)
    is_request = isinstance(messages, dict) and not messages.keys().isdisjoint(REQUEST)
    try:
        body = msgspec.json.encode(messages if is_request else {"messages": messages}, enc_hook=_plain)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError, UnicodeEncodeError):
        body = repr(messages).encode("utf-8", "surrogatepass")
        is_request = False
    found = needs(body, provider=provider, model=model, window=window, counter=counter)
    return found if is_request else msgspec.structs.replace(found, cache_writes="1h")


def message_tokens(
    messages: object, *, model: str | None = None, window: int | None = None, counter: Counter | None = None
) -> int:
    """The most input tokens of what `message_needs` takes."""
    return message_needs(messages, model=model, window=window, counter=counter).input_tokens


def output_tokens(max_output_tokens: int | None, assumed: int | None, model_max: int | None, choices: int = 1) -> int:
    """The most output tokens over all choices: the request's own limit, else the policy's assumption, else the
    model's maximum, else `DEFAULT_OUTPUT_TOKENS`; times the choices. From 0 to 2^53 - 1."""
    each = max_output_tokens
    if each is None:
        each = assumed if assumed is not None else model_max
    if each is None:
        each = DEFAULT_OUTPUT_TOKENS
    if 0 <= each <= MAX_AMOUNT and choices == 1:
        return each
    return min(max(each, 0) * max(choices, 1), MAX_AMOUNT)


# ----------------------------------------------------------------------------------- reading


def _growth(text: bytes) -> int:
    """How many bytes more a text may have for a tokenizer that normalizes it."""
    grown = 0
    if not text.isascii():
        found = _GROWING.findall(text.decode("utf-8", "replace"))
        grown = sum(_grown(letter, len(letter.encode())) for letter in found)
    if b"\\u" in text:
        grown += sum(_grown(chr(int(code, 16)), 6) for code in _GROWING_ESCAPES.findall(text))
    return grown


@cache
def _grown(letter: str, length: int) -> int:
    return max(0, len(unicodedata.normalize("NFKC", letter).encode()) - length)


def _decode(body: bytes) -> object:
    try:
        return cast("object", msgspec.json.decode(body))
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _plain(value: object) -> object:
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) else repr(value)


def _goes_on(root: object) -> bool:
    """Whether a request goes on with what the provider holds."""
    if not isinstance(root, dict):
        return False
    prompt = root.get("prompt")
    return any(root.get(key) for key in _HELD_KEYS) or (isinstance(prompt, dict) and "id" in prompt)


def _cache_writes(body: bytes, marks: set[bytes], provider: str | None, model: str, *, hiding: bool) -> CacheWrites:
    """What of a request may be written to a cache, where that costs more than to read it once.

    Claude and Nova write what is marked, and nothing else. Others may write by themselves (OpenAI does).
    Source: https://platform.claude.com/docs/en/build-with-claude/prompt-caching,
    https://docs.aws.amazon.com/bedrock/latest/userguide/prompt-caching.html,
    https://developers.openai.com/api/docs/guides/prompt-caching (2026-11).
    """
    if hiding or not marks.isdisjoint(_KEEPS):
        return "1h"
    if not marks.isdisjoint(_CACHES):
        return "1h" if b'"1h"' in body else "5m"
    return "none" if provider == "anthropic" or "claude" in model or "amazon.nova" in model else "5m"


def _asked(marks: set[bytes]) -> int:
    return WEB_SEARCHES if b'web_search_options"' in marks else 0


def _web_searches(root: object) -> int:
    """How many searches a request lets the provider make."""
    if not isinstance(root, dict):
        return 0
    total = 0
    for name in ("web_search_options", "search_parameters", "webSearch"):
        if root.get(name) is not None:
            total += WEB_SEARCHES
    tools = [tool for key in ("tools", "plugins") for tool in _items(root.get(key)) if isinstance(tool, dict)]
    for tool in tools:
        named = (tool.get("type"), tool.get("name"), tool.get("id"), *tool)
        if any(isinstance(name, str) and _SEARCHES.search(name) for name in named):
            uses = tool.get("max_uses")
            total += uses if type(uses) is int and 0 <= uses <= _MOST_SEARCHES else WEB_SEARCHES
    calls = root.get("max_tool_calls")
    return min(total, calls) if type(calls) is int and calls >= 0 else total


_SEARCHES: Final = re.compile(
    r"^(?:web$|web_?search|google_?search|enterprise_?web_?search|openrouter:web_search)", re.IGNORECASE
)
_MOST_SEARCHES: Final = 10_000


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _search_units(root: object) -> int:
    """Cohere bills a query with up to 100 documents as one; a document of more than 500 tokens, the query's included,
    counts as several. Source: https://cohere.com/pricing (2026-11)."""
    if not isinstance(root, dict):
        return 0
    query = len(str(root.get("query")).encode("utf-8", "surrogatepass"))
    room = max(100, 500 - query)
    chunks = sum(
        -(-len(str(text).encode("utf-8", "surrogatepass")) // room) or 1 for text in _items(root.get("documents"))
    )
    return -(-chunks // 100)
