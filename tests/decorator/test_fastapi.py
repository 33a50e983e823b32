"""`@guarded` under FastAPI: the one that is installed, and the oldest one that services may still run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from tests.decorator import fastapi_checks

import asgi_llm_guard

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
OLD = "fastapi==0.110.*"


@pytest.mark.parametrize("check", fastapi_checks.CHECKS, ids=lambda check: check.__name__)
async def test_current_fastapi(check: Callable[[], Awaitable[None]]) -> None:
    """What `@guarded` promises holds under the FastAPI that is installed here."""
    await check()


@pytest.mark.slow
def test_old_fastapi(tmp_path: Path) -> None:
    """The same holds under FastAPI 0.110 with its Starlette, in an environment of its own."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    wanted = [OLD, f"msgspec=={msgspec.__version__}"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], check=True)
    # Not installed, because its dependencies ask for a newer Starlette; and not by the path of `src`, which is gone
    # where the wheel is tested.
    shutil.copytree(Path(asgi_llm_guard.__file__).parent, tmp_path / "package" / "asgi_llm_guard")
    shutil.copytree(ROOT / "tests" / "decorator", tmp_path / "package" / "tests" / "decorator")
    shutil.copytree(ROOT / "tests" / "middleware", tmp_path / "package" / "tests" / "middleware")
    run = subprocess.run(
        [python, "-m", "tests.decorator.fastapi_checks"],
        cwd=tmp_path / "package",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "package")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "FastAPI 0.110." in run.stdout
    assert run.stdout.count("passed") == len(fastapi_checks.CHECKS) + 1
    assert sys.version_info >= (3, 11)
