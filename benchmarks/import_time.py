"""What `import asgi_llm_guard` costs on top of an empty interpreter. The limit is 150 ms."""

from __future__ import annotations

import subprocess
import sys

from benchmarks._harness import Result, compare, duration, percentile, table

LIMIT_S = 0.150


def python(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True)


def measure() -> list[Result]:
    return compare(
        {
            "an empty interpreter": lambda: python("pass"),
            "import asgi_llm_guard": lambda: python("import asgi_llm_guard"),
            "import msgspec": lambda: python("import msgspec"),
            "import starlette.applications": lambda: python("import starlette.applications"),
        },
        operations=1,
        rounds=20,
    )


def main() -> int:
    results = measure()
    empty, package, *_ = results
    cost_s = percentile([own - base for own, base in zip(package.samples_s, empty.samples_s, strict=True)], 10)
    print(table(results, title="Import time"))
    print(f"\nThe import costs {duration(cost_s)} (p10) of {duration(LIMIT_S)} allowed.")
    return 0 if cost_s <= LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
