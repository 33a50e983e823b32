"""Settings: the file, the environment, secrets, and what each mistake says."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asgi_llm_guard import Guard, GuardMiddleware
from asgi_llm_guard.errors import ConfigurationError
from asgi_llm_guard.identity import (
    DEFAULT_SESSION,
    ApiKeys,
    Identity,
    JwtIdentity,
    PeerAddress,
    TrustedHeaders,
    baggage,
    body,
    first_of,
    header,
    vendor_header,
)
from asgi_llm_guard.settings import GuardSettings, build_guard_arguments, build_middleware_arguments, load_settings
from asgi_llm_guard.storage.entries import Bounds
from asgi_llm_guard.storage.memory import MemoryStorage
from asgi_llm_guard.stream_rules import StreamRules

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"
SECRET = "canary: a pepper that is long enough"
ITERATIONS = '[[policies]]\nkind = "iterations"\n'
JWT = '[identity]\nkind = "jwt"\nissuer = "me"\naudience = false\n'
PEM = "-----BEGIN PUBLIC KEY-----\ncanary\n-----END PUBLIC KEY-----"


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the process, put back after the test."""
    return monkeypatch


def write(folder: Path, text: str) -> Path:
    file = folder / "guard.toml"
    file.write_text(text, encoding="utf-8")
    return file


def problem(file: Path) -> str:
    """What loading and building `file` complains of."""
    with pytest.raises(ConfigurationError) as caught:
        build_guard_arguments(load_settings(file))
    return str(caught.value)


def example() -> tuple[str, str]:
    """The complete file and the keys file, as the page shows them."""
    guard, keys = re.findall(r"```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return guard, keys


def test_example(tmp_path: Path, environ: pytest.MonkeyPatch) -> None:
    """The complete file on the page loads, and says what the code would."""
    environ.chdir(tmp_path)
    environ.setenv("GUARD_WEBHOOK_SECRET", SECRET)
    guard, keys = example()
    (tmp_path / "keys.toml").write_text(keys.replace('secret_file = "keys.secret"', ""))
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "llm_guard_identity__secret").write_text(SECRET + "\n")
    settings = load_settings(write(tmp_path, guard))
    arguments = build_guard_arguments(settings)

    assert [type(policy).__name__ for policy in arguments["policies"]] == [
        "ModelAllow",
        "Iterations",
        "ProviderBudget",
        "Budget",
        "Quota",
        "RateLimit",
        "RateLimit",
        "Concurrency",
        "CacheScope",
    ]
    assert arguments["policies"][6].name.endswith(".shadow")
    assert arguments["agents"] == {"researcher": {"max_iterations": 50}}
    assert arguments["session"] == first_of(header("x-session-id"), body("metadata.session_id"), baggage("session.id"))
    assert isinstance(arguments["identity"], ApiKeys)
    assert arguments["prices"].overrides == {"openai/our-own-model": {"input": 0.5, "output": 2}}
    cache = arguments["cache"]
    assert (cache.ttl_ms, cache.streams, cache.wait_s, cache.ignore) == (3_600_000, False, 30, {"metadata"})
    assert isinstance(cache.storage, MemoryStorage)
    assert cache.bounds == Bounds()
    assert {name: arguments[name] for name in ("storage", "disclose", "hold_wait_s", "statuses", "max_body_bytes")} == {
        "storage": "sqlite:///guard.db",
        "disclose": "owned",
        "hold_wait_s": 0.25,
        "statuses": {"budget_exhausted": 429},
        "max_body_bytes": 8 * 1024 * 1024,
    }

    middleware = build_middleware_arguments(settings)
    chat, agents = middleware.pop("routes")
    assert (chat.path, chat.methods, chat.dialect, chat.clamp) == ("/v1/chat/completions", ["POST"], "auto", True)
    assert (agents.path, agents.dialect, agents.session) == ("/agents/{name}", None, first_of(header("x-run-id")))
    assert [policy.name for policy in agents.extra] == ["agent_iterations"]
    assert arguments["streams"] == StreamRules(idle_s=60, total_s=600, drain="close")
    assert (chat.streams, agents.streams) == (StreamRules(cut=True), None)
    assert middleware == {"exempt": ["/health"], "unlisted": "pass", "rate_limit_headers": True}


def test_example_shows_every_key() -> None:
    """The page's file has every key there is."""
    guard, _ = example()
    missing = [name for name in GuardSettings.model_fields if not re.search(rf"^\[*{name}\b", guard, re.MULTILINE)]
    assert missing == []


def test_example_builds_a_guard(tmp_path: Path, environ: pytest.MonkeyPatch) -> None:
    """What the page's file says is accepted by the guard and the middleware."""
    environ.chdir(tmp_path)
    environ.setenv("GUARD_WEBHOOK_SECRET", SECRET)
    guard, keys = example()
    (tmp_path / "keys.toml").write_text(keys)
    (tmp_path / "keys.secret").write_text(SECRET)
    (tmp_path / "secrets").mkdir()
    settings = load_settings(write(tmp_path, guard.replace("sqlite:///guard.db", "memory://")))

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    built = Guard(**build_guard_arguments(settings))
    GuardMiddleware(app, guard=built, **build_middleware_arguments(settings))
    assert len(built.policies) >= len(settings.policies)
    asyncio.run(built.aclose())


def test_empty_file(tmp_path: Path) -> None:
    """An empty file leaves everything to the guard's own defaults."""
    settings = load_settings(write(tmp_path, ""))
    assert build_guard_arguments(settings) == {"policies": [], "storage": "memory://", "agents": {}}
    assert build_middleware_arguments(settings) == {
        "routes": None,
        "exempt": [],
        "unlisted": "pass",
        "rate_limit_headers": True,
    }


def test_numbers_as_text(tmp_path: Path) -> None:
    """A3: limits given as text are whole numbers."""
    text = '[[policies]]\nkind = "iterations"\nlimit = "25"\n[agents.researcher]\nmax_iterations = "30"\n'
    arguments = build_guard_arguments(load_settings(write(tmp_path, text)))
    assert arguments["agents"] == {"researcher": {"max_iterations": 30}}


def test_sources(tmp_path: Path) -> None:
    """A2: the places of the session id can be chosen; unless they are, the guard's own are used."""
    arguments = build_guard_arguments(load_settings(write(tmp_path, 'session = ["vendor_header:x-*-session-id"]')))
    assert arguments["session"] == first_of(vendor_header("x-*-session-id"))
    assert arguments["session"] != DEFAULT_SESSION


# -------------------------------------------------------------------------------- environment


def test_environment_wins(tmp_path: Path, environ: pytest.MonkeyPatch) -> None:
    """A5: for each key the environment wins over the file, and leaves the keys beside it alone."""
    file = write(
        tmp_path,
        'storage = "sqlite:///file.db"\nhold_wait_s = 1\nsession_ttl = "2d"\n'
        "[agents.researcher]\nmax_iterations = 1\nx_tone = 'dry'\n[agents.writer]\nmax_iterations = 2\n"
        "[departments.research]\ndaily_tokens = 1\n[[policies]]\nkind = 'quota'\n[statuses]\nbudget = 402\nrate = 503\n",
    )
    environ.setenv("LLM_GUARD_STORAGE", "sqlite:///env.db")
    environ.setenv("llm_guard_hold_wait_s", "0.5")
    environ.setenv("LLM_GUARD_AGENTS__RESEARCHER__MAX_ITERATIONS", "30")
    environ.setenv("LLM_GUARD_DEPARTMENTS__RESEARCH__MODELS", '["openai/*"]')
    environ.setenv("LLM_GUARD_STATUSES__RATE", "429")
    settings = load_settings(file)
    arguments = build_guard_arguments(settings)

    assert arguments["storage"] == "sqlite:///env.db"
    assert arguments["hold_wait_s"] == 0.5
    assert arguments["session_ttl"] == "2d"
    assert arguments["agents"] == {
        "researcher": {"max_iterations": 30, "x_tone": "dry"},
        "writer": {"max_iterations": 2},
    }
    assert settings.departments["research"].arguments() == {"daily_tokens": 1}
    assert settings.departments["research"].models == ["openai/*"]
    assert arguments["statuses"] == {"budget": 402, "rate": 429}


def test_whole_lists(tmp_path: Path, environ: pytest.MonkeyPatch) -> None:
    """A whole list may come from the environment, as JSON."""
    file = write(tmp_path, '[[policies]]\nkind = "iterations"\nlimit = 25\n')
    environ.setenv("LLM_GUARD_POLICIES", '[{"kind": "rate_limit", "rates": "1/minute"}]')
    environ.setenv("LLM_GUARD_EXEMPT", '["/health"]')
    settings = load_settings(file)
    assert [policy.kind for policy in settings.policies] == ["rate_limit"]
    assert build_middleware_arguments(settings)["exempt"] == ["/health"]


@pytest.mark.parametrize(
    "variable, whole",
    [
        ("LLM_GUARD_POLICIES__0__LIMIT", "LLM_GUARD_POLICIES"),
        ("LLM_GUARD_POLICIES__0", "LLM_GUARD_POLICIES"),
        ("llm_guard_policies__0__limit", "LLM_GUARD_POLICIES"),
        ("LLM_GUARD_ROUTES__0__PATH", "LLM_GUARD_ROUTES"),
        ("LLM_GUARD_SESSION__0", "LLM_GUARD_SESSION"),
        ("LLM_GUARD_EXEMPT__1", "LLM_GUARD_EXEMPT"),
    ],
)
def test_entries_of_lists(tmp_path: Path, environ: pytest.MonkeyPatch, variable: str, whole: str) -> None:
    """A variable for an entry of a list, which would be ignored in silence, is refused."""
    environ.setenv(variable, "canary")
    assert problem(write(tmp_path, "")) == (
        f"environment variable {variable}: an entry of a list cannot be set from the environment; "
        f"change it in the file, or set the whole list, as JSON, in {whole}"
    )


def test_unknown_variables(tmp_path: Path, environ: pytest.MonkeyPatch) -> None:
    """A misspelt variable is refused with the known ones."""
    environ.setenv("LLM_GUARD_HOLD_WAIT", "canary")
    text = problem(write(tmp_path, ""))
    assert text.startswith("environment variable LLM_GUARD_HOLD_WAIT: unknown; known are LLM_GUARD_STORAGE, ")
    assert "LLM_GUARD_HOLD_WAIT_S" in text
    assert "canary" not in text


@pytest.mark.parametrize(
    "name", ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR"]
)
def test_variables_of_clusters(tmp_path: Path, environ: pytest.MonkeyPatch, name: str) -> None:
    """What a cluster sets for a service called llm-guard does not stop the start."""
    environ.setenv(f"LLM_GUARD_{name}", "tcp://10.0.0.1:80")
    load_settings(write(tmp_path, ""))


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("LLM_GUARD_DISCLOSE", "everything", "disclose: expected 'owned' or 'all', got 'everything'"),
        ("LLM_GUARD_MAX_BODY_BYTES", "-1", "max_body_bytes: expected greater than or equal to 0, got '-1'"),
        ("LLM_GUARD_AGENTS__R__MAX_ITERATIONS", "many", "agents.r.max_iterations: expected a whole number"),
        ("LLM_GUARD_IDENTITY__KIND", "magic", "identity.kind: expected one of api_keys, jwt, .*, got 'magic'"),
        ("LLM_GUARD_POLICIES", '[{"kind": "iterations", "limit": -1}]', r"policies\[0\]: iterations.limit: .* got -1"),
    ],
)
def test_wrong_variables(tmp_path: Path, environ: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    """A wrong value is traced to the variable that set it, not to the file."""
    environ.setenv(variable, value)
    assert re.match(f"environment variable {variable}[A-Z_]*: {message}", problem(write(tmp_path, "")))


def test_variable_that_is_not_json(tmp_path: Path, environ: pytest.MonkeyPatch) -> None:
    """A list that is not JSON is named, and not shown."""
    environ.setenv("LLM_GUARD_POLICIES", "canary")
    assert problem(write(tmp_path, "")) == "environment variable or secret file LLM_GUARD_POLICIES: is not valid JSON"


@pytest.mark.parametrize("variable", ["LLM_GUARD_STORAGE__URL", "LLM_GUARD_DISCLOSE__TO", "LLM_GUARD_HOLD_WAIT_S__MAX"])
def test_keys_in_what_is_no_table(tmp_path: Path, environ: pytest.MonkeyPatch, variable: str) -> None:
    """A variable of a key inside of what is a single value would be ignored, and is refused."""
    environ.setenv(variable, "canary")
    text = problem(write(tmp_path, ""))
    assert text.startswith(f"environment variable {variable}: ")
    assert text.endswith(f"is no table; set {variable.partition('__')[0]}")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("llm_guard_storge", b"canary", "secret file llm_guard_storge: unknown; known are LLM_GUARD_STORAGE, "),
        ("LLM_GUARD_STORAGE__URL", b"canary", "secret file LLM_GUARD_STORAGE__URL: storage is no table"),
        ("llm_guard_policies__0__limit", b"canary", "an entry of a list cannot be set"),
        ("llm_guard_control__secrt", b"canary", "control.secrt: unknown key; expected one of url, secret, old_secret"),
        ("llm_guard_storage", b"\xff", "cannot be read: is not UTF-8"),
    ],
)
def test_wrong_secret_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A secret file that would be ignored, or cannot be read, is refused like a variable; its content is not shown."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_bytes(content)
    text = problem(write(tmp_path, 'secrets_dir = "run"'))
    assert message in text
    assert "canary" not in text


def test_other_secret_files(tmp_path: Path) -> None:
    """Files of others, as in a folder that services share, are passed over."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "database_password").write_text("canary", encoding="utf-8")
    load_settings(write(tmp_path, 'secrets_dir = "run"'))


@pytest.mark.parametrize(
    "text, message",
    [
        ('[admin]\ntitel = "x"', "line 2: admin.titel: unknown key; expected one of credentials, secret, "),
        (f'[control]\nold_secret = "{SECRET}"', "line 2: control.old_secret: goes with secret, which is missing"),
        (f'[admin]\nold_secret = "{SECRET}"', "line 2: admin.old_secret: goes with secret, which is missing"),
        ("[alerts]\nthresholds = []", "line 1: alerts: Alerts: expected at least one rule"),
        ('[alerts]\npatience = "1s"', "line 1: alerts: Alerts.patience: "),
        (
            '[[alerts.webhooks]]\nurl = "https://a.example"\nsecrt = 1',
            "line 3: alerts.webhooks[0].secrt: unknown key; expected one of url, secret, allow, ",
        ),
        ('[control]\nurl = "sqlite:///x.db?y=1"', "line 1: control: "),
        ('[[alerts.webhooks]]\nurl = "https://a.example"\nsecret = "env:NOT_THERE"', "line 1: alerts: Webhook "),
        ('[[routes]]\npath = "/a"\nmethods = 5', "line 1: routes[0]: "),
        ('[[policies]]\nkind = "budget"\nlimits = ["$5/daily"]\ntz = []', "line 1: policies[0]: "),
    ],
)
def test_wrong_tables_of_operations(tmp_path: Path, text: str, message: str) -> None:
    """What nobody would read, and what would do nothing, is told at the start, with its line."""
    assert f"{tmp_path / 'guard.toml'}, {message}" in problem(write(tmp_path, text))


def test_secrets_of_webhooks_of_another_type(tmp_path: Path) -> None:
    """T15: a secret that is no text is not shown, wherever it stands."""
    hook = '[[alerts.webhooks]]\nurl = "https://a.example"\nsecret = {}'
    for secret in ("987654321987654321", '["env:X", 987654321987654321]'):
        text = problem(write(tmp_path, hook.format(secret)))
        assert "line 3: alerts.webhooks[0].secret" in text
        assert "98765" not in text


def test_settings_in_code(environ: pytest.MonkeyPatch) -> None:
    """In code, what is passed wins over the environment, which fills in the rest."""
    environ.setenv("LLM_GUARD_STORAGE", "sqlite:///env.db")
    environ.setenv("LLM_GUARD_DISCLOSE", "all")
    settings = GuardSettings(disclose="owned")
    assert (settings.disclose, settings.storage.get_secret_value()) == ("owned", "sqlite:///env.db")
    assert settings.directory == Path()


# ------------------------------------------------------------------------------------ secrets


def test_secret_files(tmp_path: Path, environ: pytest.MonkeyPatch) -> None:
    """T25: secret files win over the file, and the environment over both."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "LLM_GUARD_STORAGE").write_text("sqlite:///secret.db\n")
    (tmp_path / "run" / "another_secret").write_text("of another service")
    file = write(tmp_path, 'storage = "sqlite:///file.db"\nsecrets_dir = "run"\n')
    assert load_settings(file).storage.get_secret_value() == "sqlite:///secret.db"
    environ.setenv("LLM_GUARD_STORAGE", "sqlite:///env.db")
    assert load_settings(file).storage.get_secret_value() == "sqlite:///env.db"


def test_secrets_folder_from_the_environment(tmp_path: Path, environ: pytest.MonkeyPatch) -> None:
    """The folder of secret files may come from the environment; one that is not there stops the start."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "llm_guard_storage").write_text("sqlite:///secret.db")
    environ.setenv("LLM_GUARD_SECRETS_DIR", str(tmp_path / "run"))
    file = write(tmp_path, 'secrets_dir = "elsewhere"')
    assert load_settings(file).storage.get_secret_value() == "sqlite:///secret.db"
    environ.setenv("LLM_GUARD_SECRETS_DIR", "nowhere")
    assert problem(file) == f"{file}: secrets_dir: expected a folder, got {str(tmp_path / 'nowhere')!r}"


def test_secrets_are_not_shown(tmp_path: Path, environ: pytest.MonkeyPatch) -> None:
    """T15, T25: neither the settings nor their problems show a secret."""
    (tmp_path / "keys.toml").write_text("")
    environ.setenv("LLM_GUARD_IDENTITY__SECRET", SECRET)
    text = 'storage = "redis://user:canary@host/0"\n[identity]\nkind = "api_keys"\nfile = "keys.toml"\n'
    settings = load_settings(write(tmp_path, text))
    assert "canary" not in repr(settings)
    assert "canary" not in settings.model_dump_json()

    environ.setenv("LLM_GUARD_IDENTITY__SECRET", '["canary"]')
    assert "canary" not in repr(load_settings(write(tmp_path, text)))
    environ.delenv("LLM_GUARD_IDENTITY__SECRET")
    for wrong in (
        'storage = ["canary"]',
        'storage = 7\n[identity]\nkind = "api_keys"\nfile = "keys.toml"\nsecret = "canary"\nsecrte = "canary"',
        '[identity]\nkind = "api_keys"\nfile = "keys.toml"\nsecret = ["canary"]',
        JWT + 'key = "canary"\nkey_file = "canary.pem"\nalgorithms = ["HS256"]\n',
        JWT + 'key = "canary"\nalgorithms = ["HS256"]\n',
        JWT + 'key = "{canary"\nalgorithms = ["HS256"]\n',
    ):
        assert "canary" not in problem(write(tmp_path, wrong))


@pytest.mark.parametrize(
    "text, key",
    [
        ("storage = 8154711", "storage"),
        ('[identity]\nkind = "api_keys"\nfile = "k"\nsecret = 8154711', "identity.secret"),
        (JWT + 'algorithms = ["HS256"]\nkey = 8154711', "identity.key"),
    ],
)
def test_secrets_of_another_type(tmp_path: Path, text: str, key: str) -> None:
    """T25: a secret that is written as a number is refused without being shown."""
    file = write(tmp_path, text)
    assert re.sub(r", line \d+", "", problem(file)) == f"{file}: {key}: expected a valid string"


# ----------------------------------------------------------------------------------- identity


def test_api_keys(tmp_path: Path) -> None:
    """Keys are read from the file beside the settings, and the secret from the settings."""
    key, record = ApiKeys.generate("team-a", secret=SECRET)
    (tmp_path / "keys.toml").write_text(record.to_toml())
    text = f'[identity]\nkind = "api_keys"\nfile = "keys.toml"\nsecret = "{SECRET}"\nheaders = ["x-key"]\n'
    resolve = build_guard_arguments(load_settings(write(tmp_path, text)))["identity"]
    assert resolve({"headers": [(b"x-key", key.encode())]}) == Identity(caller="team-a")


def test_trusted_headers(tmp_path: Path) -> None:
    """The arguments of `TrustedHeaders` stand in the table."""
    text = '[identity]\nkind = "trusted_headers"\nproxies = ["10.0.0.0/8"]\ncaller = "x-caller"\n'
    resolve = build_guard_arguments(load_settings(write(tmp_path, text)))["identity"]
    assert isinstance(resolve, TrustedHeaders)
    assert resolve({"client": ("10.0.0.1", 1), "headers": [(b"x-caller", b"ada")]}) == Identity(caller="ada")


def test_identity_from_the_environment(tmp_path: Path, environ: pytest.MonkeyPatch) -> None:
    """Lists, booleans and numbers of `[identity]` may come from the environment."""
    environ.setenv("LLM_GUARD_IDENTITY__KIND", "trusted_headers")
    environ.setenv("LLM_GUARD_IDENTITY__TRUST_HEADERS", "true")
    environ.setenv("LLM_GUARD_IDENTITY__MAX_LENGTH", "8")
    file = write(tmp_path, "")
    resolve = build_guard_arguments(load_settings(file))["identity"]
    assert resolve({"client": None, "headers": [(b"x-user-id", b"ada")]}) == Identity(caller="ada")
    assert resolve.max_length == 8

    environ.delenv("LLM_GUARD_IDENTITY__TRUST_HEADERS")
    environ.setenv("LLM_GUARD_IDENTITY__PROXIES", '["10.0.0.0/8"]')
    resolve = build_guard_arguments(load_settings(file))["identity"]
    assert resolve({"client": ("203.0.113.9", 1), "headers": [(b"x-user-id", b"ada")]}) is None


def test_peer_address(tmp_path: Path) -> None:
    """The arguments of `PeerAddress` stand in the table."""
    text = '[identity]\nkind = "peer_address"\nipv6_prefix = 48\n'
    resolve = build_guard_arguments(load_settings(write(tmp_path, text)))["identity"]
    assert isinstance(resolve, PeerAddress)
    assert resolve.ipv6_prefix == 48


def test_scope_user(tmp_path: Path) -> None:
    """Attributes of the authenticated user are named in the table; one that is not there is absent."""
    text = '[identity]\nkind = "scope_user"\ncaller = "id"\ndepartments = "groups"\nagent = "agent"\n'
    resolve = build_guard_arguments(load_settings(write(tmp_path, text)))["identity"]
    user = SimpleNamespace(is_authenticated=True, id=7, groups=["research"])
    assert resolve({"user": user}) == Identity(caller="7", departments=("research",))


@pytest.mark.parametrize("where", ["key", "key_file"])
def test_jwt(tmp_path: Path, where: str) -> None:
    """The key for tokens stands in the settings, or in a file: a JWK, or a shared secret."""
    key = '{"kty": "oct", "k": "Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5LWNhbmFyeQ"}'
    (tmp_path / "key.json").write_text(key + "\n")
    value = "key.json" if where == "key_file" else key
    text = f"[identity]\nkind = 'jwt'\n{where} = '{value}'\nalgorithms = ['HS256']\nissuer = 'me'\naudience = false\n"
    assert isinstance(build_guard_arguments(load_settings(write(tmp_path, text)))["identity"], JwtIdentity)


def test_price_file(tmp_path: Path) -> None:
    """Prices may stand in a file of their own, beside the settings."""
    (tmp_path / "prices.toml").write_text('["openai/our-own"]\ninput = 1\noutput = 2\n')
    prices = build_guard_arguments(load_settings(write(tmp_path, '[prices]\nfile = "prices.toml"')))["prices"]
    assert list(prices.overrides) == ["openai/our-own"]


def test_one_book(tmp_path: Path) -> None:
    """C16: the guard and its routes read the same quotas, so that a change reaches both."""
    text = (
        "[departments.research]\ndaily_tokens = 1\n[[policies]]\nkind = 'quota'\n"
        "[[routes]]\npath = '/a'\n[[routes.extra]]\nkind = 'quota'\nname = 'again'\n"
    )
    settings = load_settings(write(tmp_path, text))
    (policy,) = build_guard_arguments(settings)["policies"]
    (route,) = build_middleware_arguments(settings)["routes"]
    assert policy.book is route.extra[0].book is settings.book


# ----------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "text, message",
    [
        ("storage = ", r"is not valid TOML: .*line 1, column"),
        ("a = 1\na = 2", r"is not valid TOML: .*line 2, column 6"),
        ("colour = 1", "colour: unknown key; expected one of storage, policies, .*, secrets_dir"),
        ("storage = 7", "storage: expected a valid string"),
        ('policies = "iterations"', "policies: expected a valid list, got 'iterations'"),
        ("policies = [7]", r"policies\[0\]: expected a valid dictionary or instance of PolicySettings, got 7"),
        ("[[policies]]\nlimit = 25", r"policies\[0\].kind: is missing"),
        ('[[policies]]\nkind = "magic"', r"policies\[0\].kind: expected 'budget', .* or 'rate_limit', got 'magic'"),
        (ITERATIONS + "limt = 25", r"policies\[0\].limt: unknown key; expected one of kind, shadow, limit, per, ttl"),
        (ITERATIONS + "agents = {}", r"policies\[0\].agents: unknown key"),
        (ITERATIONS + 'limit = "many"', r"policies\[0\]: iterations.limit: expected a whole number .* got 'many'"),
        (ITERATIONS + 'shadow = "perhaps"', r"policies\[0\].shadow: expected a valid boolean, .*got 'perhaps'"),
        ('[[policies]]\nkind = "rate_limit"', r"policies\[0\].rates: is missing"),
        (
            '[[policies]]\nkind = "quota"\nbook = 1',
            r"policies\[0\].book: unknown key; expected one of kind, shadow, unknown",
        ),
        ('[[policies]]\nkind = "budget"\nlimits = "5/1d"', r"policies\[0\]: .*'\$5/1d'.*got '5/1d'"),
        ("[agents.r]\nmax_iteration = 5", "agents.r.max_iteration: unknown parameter; known are max_iterations"),
        ("[agents.r]\nmax_iterations = 2.5", "agents.r.max_iterations: expected a whole number .* got 2.5"),
        ("agents.r = 5", "agents.r: expected a valid dictionary, got 5"),
        (
            "[departments.r]\ndaily_token = 5",
            "departments.r.daily_token: unknown key; expected one of models, daily_tokens",
        ),
        ("[departments.r]\ndaily_tokens = -5", "departments.r: .*daily_tokens.* got -5"),
        ("[departments.r]\ndaily_tokens = 5", 'departments: no policy reads them; add .* kind = "quota"'),
        ('[identity]\nfile = "keys.toml"', "identity.kind: is missing; expected one of api_keys, jwt"),
        ('[identity]\nkind = "api_keys"', "identity.file: is missing"),
        (
            '[identity]\nkind = "api_keys"\nfile = "k"\nx = 1',
            "identity.x: unknown key; expected one of kind, file, secret",
        ),
        ('[identity]\nkind = "api_keys"\nfile = "keys.toml"', "identity: .*keys.toml: cannot be read: No such file"),
        ('[identity]\nkind = "trusted_headers"', "identity: TrustedHeaders: say whose headers are believed"),
        ('[identity]\nkind = "trusted_headers"\nx = 1', "identity.x: unknown key; expected one of kind, proxies"),
        ('[identity]\nkind = "peer_address"\nipv6_prefix = 8', "identity: PeerAddress: ipv6_prefix must be .* got 8"),
        (
            '[identity]\nkind = "scope_user"\nname = "x"',
            "identity.name: unknown key; expected one of kind, caller, user",
        ),
        (JWT + 'algorithms = ["RS256"]', "identity: expected either key or key_file"),
        (
            JWT + 'algorithms = ["RS256"]\nkey_file = "k.pem"',
            "identity: key_file: .*k.pem cannot be read: No such file",
        ),
        (JWT + 'algorithms = ["RS256"]\nkey = "{"', r"identity: key: begins like a JWK, .* \(line 1, column 2\)"),
        (JWT + f'algorithms = ["none"]\nkey = """{PEM}"""', "identity: JwtIdentity: algorithms must be among HS256"),
        (JWT + 'algorithms = ["RS256"]\nkey = "k"\nleeway_s = true', "identity.leeway_s: expected a number, got True"),
        (
            'session = ["x-session-id"]',
            "session: expected one of header:NAME, body:PATH|session: expected one of header:NAME",
        ),
        ('session = ["header:a b"]', "session: header: expected a header's name .* got 'a b'"),
        ("session = []", "session: first_of: expected at least one extractor"),
        ('[prices]\nunknown = "free"', "prices: unknown: expected 'deny', 'allow' or .* got 'free'"),
        ('[prices]\nfile = "p.toml"', "prices: .*cannot read prices from .*p.toml"),
        ('[prices]\nfile = "p.toml"\noverrides = {}', "prices: expected either file or overrides"),
        ("[prices]\ncolour = 1", "prices.colour: unknown key; expected one of file, overrides, unknown, on_conflict"),
        ('[prices.overrides."a/b"]\ninputs = 1', "prices: .*inputs"),
        ('[cache]\nttl = "90d"', "cache: cache.ttl: at most 30 days, got '90d'"),
        ("[cache]\ncolour = 1", "cache.colour: unknown key; expected one of ttl, streams, wait, storage, ignore"),
        ("[cache]\nmax_bytes = true", "cache.max_bytes: expected a number, got True"),
        ("[cache]\nmax_entries = 0", "cache: max_entries: expected a whole number from 1, got 0"),
        ('[cache]\nstorage = "limits+memory://"', "cache: cache.storage: a LimitsStorage cannot keep answers"),
        ('[cache]\nstorage = "file.db"', "cache: storage: expected a URL"),
        ('[[routes]]\npath = "chat"', r"routes\[0\]: Route: the path must start with '/', got 'chat'"),
        ("[[routes]]\nclamp = true", r"routes\[0\].path: is missing"),
        (
            '[[routes]]\npath = "/"\ncolour = 1',
            r"routes\[0\].colour: unknown key; expected one of dialect, extra, session, streams, path",
        ),
        ('[[routes]]\npath = "/"\ndialect = "klingon"', r"routes\[0\]: .*klingon"),
        (
            '[[routes]]\npath = "/"\n[[routes.extra]]\nkind = "iterations"\nlimit = -1',
            r"routes\[0\].extra\[0\]: .* got -1",
        ),
        ('exempt = ["health"]', "exempt: a path must start with '/', got 'health'"),
        ('unlisted = "allow"', "unlisted: expected 'deny' or 'pass', got 'allow'"),
        ("[statuses]\nteapot = 418", "statuses: expected one of rate, .*got 'teapot'"),
        ("hold_wait_s = 61", "hold_wait_s: expected less than or equal to 60, got 61"),
        ("hold_wait_s = true", "hold_wait_s: expected a number, got True"),
        (f'session_overflow = "{"x" * 200}"', "session_overflow: expected 'deny' or 'share', got 'x{79}…$"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    """A3: a mistake is named by file, key, value and what is allowed, before anything is served."""
    file = write(tmp_path, text)
    seen = problem(file)
    said = re.sub(r"^(\S+), line \d+: ", r"\1: ", seen)
    assert said.startswith(f"{file}: ")
    assert re.match(message, said.removeprefix(f"{file}: "), re.DOTALL), seen
    assert "pydantic" not in seen


def test_mixed_table(tmp_path: Path, environ: pytest.MonkeyPatch) -> None:
    """A table that does not hold together, and is partly set by the environment, names the variable too."""
    environ.setenv("LLM_GUARD_IDENTITY__TRUST_HEADERS", "true")
    file = write(tmp_path, '[identity]\nkind = "trusted_headers"\nproxies = ["10.0.0.0/8"]\n')
    assert problem(file).startswith(
        f"{file}, line 1 with environment variable LLM_GUARD_IDENTITY__TRUST_HEADERS: identity: "
    )


def test_every_mistake(tmp_path: Path) -> None:
    """All mistakes of a file are named at once, a line each."""
    file = write(tmp_path, 'disclose = "none"\n[[policies]]\nkind = "iterations"\nlimit = -1\n')
    first, second = problem(file).splitlines()
    assert first.startswith(f"{file}, line 4: policies[0]: iterations.limit: ")
    assert second == f"{file}, line 1: disclose: expected 'owned' or 'all', got 'none'"


def test_mistakes_on_the_page(tmp_path: Path, environ: pytest.MonkeyPatch) -> None:
    """The mistakes that the page shows are what is said."""
    file = write(
        tmp_path,
        '[[policies]]\nkind = "iterations"\nlimit = "many"\n[[policies]]\nkind = "budget"\nlimt = "$5/1d"\n',
    )
    environ.setenv("LLM_GUARD_DISCLOSE", "everything")
    (shown,) = re.findall(r"```text\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert problem(file).replace(str(file), "guard.toml") == shown.strip()


def test_no_file(tmp_path: Path) -> None:
    """A file that is not there is named."""
    assert problem(tmp_path / "guard.toml") == f"{tmp_path / 'guard.toml'}: cannot be read: No such file or directory"


def test_light_import() -> None:
    """The package loads no settings library until settings are used."""
    code = "import sys, asgi_llm_guard; print({'pydantic', 'pydantic_settings'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_administration_data_are_in_the_file_of_the_storage(tmp_path: Path) -> None:
    """Without a database of its own, `[control]` is in the file of a SQLite storage; Redis needs one."""
    file = tmp_path / "own.db"
    control = build_guard_arguments(load_settings(write(tmp_path, f'storage = "sqlite:///{file}"\n[control]\n')))[
        "control"
    ]
    assert control.database.place == f"sqlite:///{file}"
    asyncio.run(control.aclose())
    assert "control: url: is missing" in problem(write(tmp_path, 'storage = "redis://localhost"\n[control]\n'))
