#!/bin/sh -eu
# redis_peers with LiteLLM's hooks beside it. They need openai < 3 and httpx < 1, so they get an environment of their
# own, outside of this folder. 1.82.7 and 1.82.8 were malicious; nothing below 1.84 is installed.
cd "$(dirname "$0")/.."
PYTHON="${VENV:-.venv}/bin/python"
LITELLM="${LITELLM_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/asgi-llm-guard/litellm}"
scripts/install
scripts/install-servers
[ -x "$LITELLM/bin/python" ] || "$PYTHON" -m venv "$LITELLM"
"$LITELLM/bin/python" -m pip install --quiet --disable-pip-version-check 'litellm[proxy]>=1.84,<2' 'redis>=7.1,!=8.0.0,<9' 'hiredis>=3.2,<4' uvloop
"$PYTHON" -m pip install --quiet --disable-pip-version-check --group bench
exec "$PYTHON" -m benchmarks.redis_peers "$@" --litellm "$LITELLM/bin/python"
