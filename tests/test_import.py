"""What `import asgi_llm_guard` brings along."""

from __future__ import annotations

import subprocess
import sys

# Heavy, optional, or somebody else's choice: loaded when they are used.
LATE = {
    "click",
    "fastapi",
    "genai_prices",
    "httpx",
    "httpx2",
    "jinja2",
    "joserfc",
    "limits",
    "litellm",
    "opentelemetry",
    "pydantic",
    "pydantic_settings",
    "redis",
    "sqlite3",
    "starlette.applications",
    "tiktoken",
    "uvicorn",
    "yaml",
}


def test_import_is_light() -> None:
    """The package imports without one of the libraries that only some of its users need."""
    program = "import sys; before = set(sys.modules); import asgi_llm_guard; print(*set(sys.modules) - before)"

    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()

    assert "asgi_llm_guard" in loaded
    assert LATE.intersection(loaded) == set()


def test_public_names() -> None:
    """Every name that the package lists is there, once, in order."""
    program = (
        "import asgi_llm_guard as package\n"
        "names = list(getattr(package, '__all__', []))\n"
        "assert names == sorted(set(names), key=lambda name: (not name[0].isupper(), name)), names\n"
        "assert not [name for name in names if not hasattr(package, name)]\n"
    )

    checked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert checked.stderr == ""
