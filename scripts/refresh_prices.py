#!/usr/bin/env python
"""Refresh `src/asgi_llm_guard/data/prices.json` from the newest releases of its sources, and show what changed.

    python scripts/refresh_prices.py            # install both sources into a folder of their own, compile, show, write
    python scripts/refresh_prices.py --check    # the same, and write nothing

The sources are packages (`genai-prices`, and `litellm` for its cost map), installed from the package index as
wheels, so nothing of them is run but the data of `genai-prices`. Every rate that changed is shown with its old
and its new value in $ for a million tokens.

Exit codes: 0: nothing changed, or it was written. 1: `--check`, and something changed. 2: a rate changed by more
than ten times, or became free or stopped being free: nothing was written; look at it, then run with `--accept`.
3: the sources could not be installed or compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from asgi_llm_guard.pricing.diff import compare

ROOT: Final = Path(__file__).resolve().parent.parent
TARGET: Final = ROOT / "src" / "asgi_llm_guard" / "data" / "prices.json"


def install(folder: Path) -> None:
    """Put the newest releases of both sources into `folder`, as wheels; of litellm nothing but itself."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    pip = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    into = ["install", "--quiet", "--only-binary", ":all:", "--target", str(folder)]
    subprocess.run([*pip, *into, "--upgrade", "genai-prices"], check=True)
    subprocess.run([*pip, *into, "--upgrade", "--no-deps", "litellm>=1.84,!=1.82.7,!=1.82.8"], check=True)


def compiled(packages: Path, output: Path, date: str) -> str:
    """Compile the snapshot of the sources in `packages`; gives where they differ from each other."""
    environment = os.environ | {"PYTHONPATH": str(packages)}  # before what is installed here
    command = [sys.executable, str(ROOT / "scripts" / "compile_prices.py"), "--litellm", str(packages)]
    command += ["--date", date, "--output", str(output)]
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something changed")
    parser.add_argument("--accept", action="store_true", help="write suspicious changes, too")
    parser.add_argument("--packages", type=Path, help="a folder with both sources; default: installed for this run")
    parser.add_argument("--date", default=datetime.now(UTC).date().isoformat(), help="the snapshot's date")
    parser.add_argument("--report", type=Path, help="where to write how the two sources differ")
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as scratch:
        packages = options.packages or Path(scratch) / "packages"
        fresh = Path(scratch) / "prices.json"
        try:
            if options.packages is None:
                install(packages)
            report = compiled(packages, fresh, options.date)
        except subprocess.CalledProcessError as error:
            print(f"the sources could not be read: {error}", file=sys.stderr)
            return 3
        if options.report:
            options.report.write_text(report, encoding="utf-8")
        content = fresh.read_text(encoding="utf-8")
    old = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {"providers": {}}
    new = json.loads(content)
    diff = compare(old, new)
    for name, source in new["sources"].items():
        was = old.get("sources", {}).get(name, {}).get("version", "-")
        print(f"{source['name']} {was} -> {source['version']}")
    print(diff)
    if options.check:
        return 1 if diff else 0
    if diff.suspicious and not options.accept:
        print("nothing was written: look at what is suspicious, then run with --accept", file=sys.stderr)
        return 2
    options.output.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
