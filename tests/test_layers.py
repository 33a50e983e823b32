"""The arrows between modules: inward, without cycles, and optional libraries only in their own file."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import asgi_llm_guard

PACKAGE = "asgi_llm_guard"
ROOT = Path(asgi_llm_guard.__file__).parent

# Every module belongs to the layer that names it, or the nearest package around it. Inner layers first:
# a layer may import itself and what its line says.
LAYERS = {
    "values": "errors clock context claims windows money decision usage events",
    "drivers": "sql",
    "protocols": "storage.base storage.entries storage.shared storage.streams policies.base identity.base",
    "rules": "agents charge control.changes control.data control.numbers control.state control.values denials describe estimate gaps idempotency learning marks media outcomes plan pricing routes secret storage.cells storage.counting storage.mistakes storage.releasing storage.state storage.taking stream_rules overlay policies.grammar policies.providers policies.subjects stops usage_rows wire identity.extract",
    "policies": "policies",
    "adapters": "control identity ledger storage telemetry",
    "engine": "active_call admission attempts background cache chores claimed configuration draining engine exchange filtering following guard guard_arguments guard_parts halting hook moment open_admissions opening operating replays scope signals standing streams",
    "skins": "alerts decorator gateway health httpx integrations middleware",
    "consoles": "admin",
    "roots": "__init__ cli doctor settings simulate testing",
}
MAY_IMPORT = {
    "values": "",
    "drivers": "values",
    "protocols": "values",
    "rules": "values protocols",
    "policies": "values protocols rules",
    "adapters": "values drivers protocols rules",
    "engine": "values drivers protocols rules",
    "skins": "values drivers protocols rules engine",
    "consoles": "values drivers protocols rules adapters engine",
    "roots": "values drivers protocols rules policies adapters engine skins consoles",
}

# The arrows that point outward, each with its reason. They are taken when a function is called, not on import.
ENTRANCES = {
    ("control.values", "identity.keys"): "keys are checked by the record that a keys file is read with",
    ("control.values", "policies.quota"): "departments are checked by the quota that code is written with",
    ("guard", "admin"): "`Guard.admin_app` and `Guard.usage_app` make the pages",
    ("guard", "admin.app"): "as above, for those who annotate with it",
    ("guard", "admin.usage"): "as above, for those who annotate with it",
    ("guard", "alerts"): "for those who annotate with it",
    ("guard", "control.store"): "as above",
    ("guard", "health"): "`Guard.health_app` makes the app that answers probes",
    ("guard", "httpx"): "`Guard.httpx_client` makes the client that the hook is in",
    ("guard", "ledger"): "opens the ledger that a URL names, for those who annotate with it",
    ("guard", "ledger.attach"): "opens the ledger that a URL names",
    ("guard", "settings"): "`Guard.from_file` reads what the settings describe",
    ("guard", "storage"): "opens the storage that a URL names",
    ("guard_parts", "alerts"): "sends what crosses a threshold; taken only where a guard has alerts",
    ("guard_parts", "control.store"): "opens the administration data that a URL names",
    ("guard_parts", "storage.memory"): "makes what a process counts in while its storage does not answer",
}

# Layers whose packages do not know each other: a storage imports no ledger, a skin no other skin.
APART = {"adapters", "skins"}
BESIDE = {
    ("control.issuing", "identity"): "a key that is made has the digest that one of a file has",
    ("control.keys", "identity"): "its table is the one that resolves the keys of a file",
    ("control.store", "identity"): "makes keys by the same rules",
    ("gateway.app", "middleware"): "the mountable gateway admits its requests where nobody around it has",
    ("integrations.langchain.chat_model", "gateway"): "the chat model is one over a gateway",
    ("integrations.langchain.messages", "gateway"): "turns answers of the gateway into messages",
}

# Which files may import a library that is not `msgspec`; one that is not here, none.
LIBRARIES = {
    "backports": "wire.encodings",
    "brotli": "wire.encodings",
    "brotlicffi": "wire.encodings",
    "botocore": "integrations.botocore",
    "click": "cli",
    "compression": "wire.encodings",
    "fastapi": "integrations.fastapi",
    "genai_prices": "pricing.genai",
    "hiredis": "storage.redis_wire",
    "httpx": "httpx guard",
    "httpx2": "alerts httpx guard gateway testing",
    "jinja2": "admin",
    "joserfc": "identity.jwt",
    "langchain_core": "integrations.langchain",
    "limits": "policies.rate storage.limits storage.limits_rates storage.limits_stores",
    "markupsafe": "admin",
    "litellm": "gateway.providers.litellm integrations.litellm",
    "opentelemetry": "telemetry",
    "psycopg": "sql.postgres",
    "pyarrow": "ledger.parquet",
    "pydantic": "integrations.langchain settings",
    "pydantic_core": "settings",
    "pydantic_settings": "settings",
    "redis": "storage.redis_wire storage.redis_cluster storage.limits_stores",
    "starlette": "admin decorator gateway identity integrations middleware testing",
    "tiktoken": "estimate",
    "uvicorn": "cli.serve testing",
    "yaml": "gateway.entries settings",
    "zstandard": "wire.encodings",
}


class Import(NamedTuple):
    importer: str
    """Without the package's name; `__init__` for the package itself."""
    target: str
    """The full name of a module, ours or not."""
    typing_only: bool


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its name without the package's."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return names


@cache
def imports() -> tuple[Import, ...]:
    """Every import statement, wherever in a module it stands."""
    return tuple(
        found for name, path in modules().items() for found in _imports_of(name, ast.parse(path.read_text("utf-8")))
    )


def _imports_of(name: str, tree: ast.Module) -> Iterator[Import]:
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, id(node) in typing_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide the arrow; write the full name"
            assert node.module is not None
            for alias in node.names:
                yield Import(name, _resolve(node.module, alias.name), id(node) in typing_only)


def _resolve(module: str, name: str) -> str:
    """`from a import b` imports the module `a.b` if there is one, else something inside `a`."""
    inside = f"{module}.{name}".removeprefix(f"{PACKAGE}.")
    return f"{module}.{name}" if module.split(".", maxsplit=1)[0] == PACKAGE and inside in modules() else module


def ours(target: str) -> str | None:
    """Which of our modules a target is; `None` if it is not ours."""
    if target == PACKAGE:
        return "__init__"
    return target.removeprefix(f"{PACKAGE}.") if target.startswith(f"{PACKAGE}.") else None


def listed(module: str, names: str) -> bool:
    """Whether the module, or a package around it, is one of the names."""
    parts = module.split(".")
    return any(".".join(parts[:length]) in names.split() for length in range(len(parts), 0, -1))


def layer(module: str) -> str:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for name, members in LAYERS.items():
            if ".".join(parts[:length]) in members.split():
                return name
    raise AssertionError(f"{module} is in no layer; add it to LAYERS in {Path(__file__).name}")


def test_every_module_has_a_layer() -> None:
    """No module is outside the table, and no name in the table is in two layers."""
    assert [name for name in modules() if not layer(name)] == []
    members = [member for names in LAYERS.values() for member in names.split()]
    assert sorted(members) == sorted(set(members))


def test_arrows_point_inward() -> None:
    """A module imports its own layer and the layers inside it, and nothing further out."""
    outward = [
        f"{importer} ({layer(importer)}) imports {target} ({layer(target)})"
        for importer, full_name, _ in imports()
        if (target := ours(full_name)) is not None
        and layer(target) not in {layer(importer), *MAY_IMPORT[layer(importer)].split()}
        and (importer, target) not in ENTRANCES
    ]

    assert outward == []


def test_neighbours_do_not_know_each_other() -> None:
    """No adapter imports one of another kind, and no skin another skin."""
    neighbours = [
        f"{importer} imports {target}"
        for importer, full_name, _ in imports()
        if (target := ours(full_name)) is not None
        and layer(importer) == layer(target)
        and layer(importer) in APART
        and importer.split(".")[0] != target.split(".")[0]
        and (importer, target.split(".")[0]) not in BESIDE
    ]

    assert neighbours == []


def test_no_import_cycles() -> None:
    """The modules can be put in an order in which each imports only earlier ones, imports in functions included."""
    graph: dict[str, set[str]] = {}
    for importer, full_name, typing_only in imports():
        target = ours(full_name)
        if target is not None and not typing_only and (importer, target) not in ENTRANCES:
            graph.setdefault(importer, set()).add(target)

    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = " <- ".join(error.args[1])
    else:
        cycle = ""

    assert cycle == ""


def test_libraries_stay_in_their_files() -> None:
    """Only `msgspec` is everybody's; every other library is imported where the table says, and nowhere else."""
    strays = sorted(
        {
            f"{importer} imports {library}"
            for importer, full_name, _ in imports()
            if (library := full_name.split(".")[0]) not in {PACKAGE, "msgspec", *sys.stdlib_module_names}
            and not listed(importer, LIBRARIES.get(library, ""))
        }
    )

    assert strays == []
