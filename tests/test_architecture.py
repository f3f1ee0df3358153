"""The floors, the public names, the generated code and the README, held to what they promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import prefixcache
import prefixcache.client
from prefixcache import errors

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "prefixcache": ROOT / "prefixcache",
    "prefixcache_kernels": ROOT / "kernels" / "prefixcache_kernels",
    "prefixcache_worker": ROOT / "worker" / "prefixcache_worker",
    "prefixcache_serving": ROOT / "worker" / "prefixcache_serving",
    "prefixcache_vllm": ROOT / "worker" / "prefixcache_vllm",
    "prefixcache_bench": ROOT / "bench" / "prefixcache_bench",
}

WORDS = (
    "prefixcache.types",
    "prefixcache.outline",
    "prefixcache.errors",
    "prefixcache.texts",
    "prefixcache.bounded_files",
    "prefixcache.remote_address",
    "prefixcache.private_files",
    "prefixcache.run_folder",
    "prefixcache.tied",
    "prefixcache.plain_json",
    "prefixcache.certificates",
    "prefixcache.model_folders",
    "prefixcache.user_folders",
    "prefixcache.pool",
    "prefixcache.movable_pool",
    "prefixcache.device",
    "prefixcache.config",
    "prefixcache.extras",
    "prefixcache.core_build",
)
WIRE = "prefixcache.v1"
PROMPTS = "prefixcache.prompts"
FLOORS = {
    "prefixcache.core": (*WORDS, "prefixcache.core"),
    "prefixcache.v1": (WIRE,),
    "prefixcache.prompts": (*WORDS, PROMPTS),
    "prefixcache.client": (*WORDS, WIRE, "prefixcache.client"),
    "prefixcache.service": (
        *WORDS,
        WIRE,
        "prefixcache.core",
        "prefixcache.client",
        "prefixcache.service",
    ),
    "prefixcache.cli": (
        *WORDS,
        WIRE,
        PROMPTS,
        "prefixcache.core",
        "prefixcache.client",
        "prefixcache.service",
        "prefixcache.cli",
    ),
    "prefixcache": (*WORDS, "prefixcache.client"),
    "prefixcache_kernels": (*WORDS, "prefixcache_kernels"),
    "prefixcache_worker": (
        *WORDS,
        WIRE,
        PROMPTS,
        "prefixcache.client",
        "prefixcache_kernels",
        "prefixcache_worker",
    ),
    "prefixcache_serving": (
        *WORDS,
        PROMPTS,
        "prefixcache.client",
        "prefixcache.service.http.browser_headers",
        "prefixcache.service.http.embedded_server",
        "prefixcache.service.http.http_connections",
        "prefixcache.service.pool.model_layout",
        "prefixcache.cli.decoder",
        "prefixcache.cli.front",
        "prefixcache_worker.child",
        "prefixcache_worker.child_service",
        "prefixcache_worker.child_worker",
        "prefixcache_worker.grammar",
        "prefixcache_worker.smollm2",
        "prefixcache_worker.text",
        "prefixcache_serving",
    ),
    "prefixcache_vllm": (
        *WORDS,
        "prefixcache.client",
        "prefixcache_kernels",
        "prefixcache_vllm",
    ),
    "prefixcache_vllm.demo": (
        *WORDS,
        "prefixcache.client",
        "prefixcache_kernels",
        "prefixcache_vllm",
        "prefixcache_worker.child",
        "prefixcache_worker.smollm2",
        "prefixcache_worker.demo",
    ),
    "prefixcache_bench": ("prefixcache",),
} | dict.fromkeys(WORDS, WORDS)
"""What each part may import of the project: itself and what lies below."""

PUBLIC = {"prefixcache": {"connect", "connect_async", "__version__"}}

IMPURE = {
    *("asyncio", "concurrent", "grpc", "logging", "multiprocessing", "os", "pathlib"),
    *("random", "secrets", "select", "signal", "socket", "subprocess", "threading", "time"),
    *("pydantic", "structlog", "torch", "uvloop"),
}
"""What the core must not touch: clocks, I/O, randomness, threads, tensors."""


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            yield ".".join((package, *parts)), path


MODULES = dict(modules())


@cache
def import_statements(path: Path) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """Those of a file, wherever in it."""
    tree = ast.walk(ast.parse(path.read_text()))
    return tuple(node for node in tree if isinstance(node, ast.Import | ast.ImportFrom))


def imports(name: str, path: Path) -> Iterator[str]:
    """Every module that a file names in an import."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base]).strip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in MODULES else base


def floor_of(name: str) -> str:
    found = [floor for floor in FLOORS if name == floor or name.startswith(f"{floor}.")]
    return max(found, key=len)


def below(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == floor or module.startswith(f"{floor}.") for floor in allowed)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_own_floor_and_below(name: str) -> None:
    allowed = FLOORS[floor_of(name)]
    for module in imports(name, MODULES[name]):
        if not module.startswith("prefixcache"):
            continue
        if module == "prefixcache":
            names = _names_from_root(MODULES[name])
            assert names <= PUBLIC["prefixcache"], f"{name} takes {names} from prefixcache"
            needs_client = names - {"__version__"}
            assert not needs_client or below("prefixcache.client", allowed), name
            continue
        if name.startswith("prefixcache_bench"):
            continue
        assert below(module, allowed), f"{name} must not import {module}"


@pytest.mark.parametrize("name", MODULES)
def test_json_is_written_by_one_function_which_writes_no_nan(name: str) -> None:
    if name != "prefixcache.plain_json":
        assert not re.search(r"\bjson\.dumps?\(", MODULES[name].read_text())


def _names_from_root(path: Path) -> set[str]:
    names: set[str] = set()
    for node in import_statements(path):
        if isinstance(node, ast.ImportFrom) and node.module == "prefixcache" and not node.level:
            names |= {
                alias.name for alias in node.names if f"prefixcache.{alias.name}" not in MODULES
            }
    return names


@pytest.mark.parametrize("name", [name for name in MODULES if floor_of(name) == "prefixcache.core"])
def test_the_core_touches_no_clock_no_device_and_no_thread(name: str) -> None:
    used = {module.partition(".")[0] for module in imports(name, MODULES[name])}
    assert not used & IMPURE


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("prefixcache.")])
def test_torch_is_never_imported_below_the_kernels(name: str) -> None:
    used = {module.partition(".")[0] for module in imports(name, MODULES[name])}
    assert not used & {"torch", "triton", "transformers"}


def test_nothing_imports_in_a_circle() -> None:
    """Nor for a type: who needs one from above says what it needs of it, in a protocol."""
    above = {
        name: {module for module in imports(name, path) if module in MODULES} - {name}
        for name, path in MODULES.items()
    }
    try:
        TopologicalSorter(above).prepare()
    except CycleError as circle:
        raise AssertionError(" imports ".join(circle.args[1])) from None


def test_no_folders_of_the_service_import_each_other_in_a_circle() -> None:
    """Its folders are floors: what is below one knows nothing of it."""

    def folder_of(name: str) -> str:
        return ".".join(name.split(".")[:3]) if name.count(".") > 2 else name

    above: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        if below(name, ("prefixcache.service",)):
            found = {folder_of(module) for module in imports(name, path) if module in MODULES}
            above.setdefault(folder_of(name), set()).update(found - {folder_of(name)})
    try:
        TopologicalSorter(above).prepare()
    except CycleError as circle:
        raise AssertionError(" imports ".join(circle.args[1])) from None


NAMED = (
    *("prefixcache.core", "prefixcache.client", "prefixcache.service", "prefixcache.prompts"),
    *("prefixcache_serving", "prefixcache_serving.__main__"),
)


@cache
def glossary() -> frozenset[str]:
    words = re.findall(r"\*\*([^*]+)\*\*", (ROOT / "docs" / "glossary.md").read_text())
    return frozenset(re.sub(r"\W+", "_", word.lower()) for word in words)


@pytest.mark.parametrize(
    "name", [name for name in MODULES if below(name, (*WORDS, *NAMED)) and name not in NAMED]
)
def test_a_module_is_named_by_a_word_of_the_glossary(name: str) -> None:
    assert name.rpartition(".")[2] in glossary(), (
        f"explain {name} in docs/glossary.md, or rename it"
    )


@pytest.mark.parametrize("part", ["cli", "client", "core", "prompts", "service"])
def test_folders_of_tests_mirror_those_of_the_source(part: str) -> None:
    """Who changes a file looks for its tests in the folder of the same name."""
    tests = (ROOT / "tests" / part).rglob("test_*.py")
    folders = {path.parent.relative_to(ROOT / "tests") for path in tests}
    assert folders
    assert not [str(one) for one in folders if not (ROOT / "prefixcache" / one).is_dir()]


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after running `code` in a fresh interpreter."""
    path = [str(ROOT)] + [str(ROOT / part) for part in ("kernels", "worker", "bench")]
    script = f"import sys; sys.path[:0] = {path!r}\n{code}\nprint('\\n'.join(sys.modules))"
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return {line.partition(".")[0] for line in told.stdout.splitlines()}


HELP = """
import io, contextlib
sys.argv = ["prefixcache", "--help"]
from prefixcache.cli.main import main
try:
    with contextlib.redirect_stdout(io.StringIO()):
        main()
except SystemExit as stop:
    assert not stop.code
"""


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import prefixcache", {"grpc", "google", "numpy", "pydantic"}),
        ("import prefixcache.core.cache", {"grpc", "google", "asyncio", "pydantic"}),
        ("import prefixcache.client", {"pydantic", "structlog", "uvloop", "typer"}),
        (HELP, {"grpc", "pydantic", "structlog", "uvloop", "prefixcache_worker"}),
        ("import prefixcache.service.server", set()),
        ("import prefixcache_serving.running", {"pydantic"}),
    ],
    ids=["the words", "the core", "the client", "prefixcache --help", "the service", "the front"],
)
def test_starting_loads_no_more_than_is_needed(code: str, unwanted: set[str]) -> None:
    loaded = loaded_by(code)
    assert "prefixcache" in loaded
    assert not loaded & (unwanted | {"torch", "triton", "transformers", "prefixcache_kernels"})


@pytest.mark.parametrize("module", [prefixcache, prefixcache.client], ids=lambda m: m.__name__)
def test_all_names_every_public_name_and_each_is_there(module: object) -> None:
    listed = module.__all__  # type: ignore[attr-defined]
    assert listed == sorted(listed)
    for name in listed:
        assert getattr(module, name).__name__ == name
    tree = ast.parse(Path(str(module.__file__)).read_text())  # type: ignore[attr-defined]
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("prefixcache.")
        for alias in node.names
    }
    assert imported == set(listed)


def test_every_error_is_public_and_has_a_status() -> None:
    from prefixcache.client.codec import STATUS_CODES

    classes = {
        name: cls
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.CacheError)
    }
    assert set(classes) <= set(prefixcache.__all__)
    assert {cls.code for cls in classes.values()} <= set(STATUS_CODES)
    for name in classes:
        assert name in str(errors.__doc__)


def test_the_generated_code_is_fresh(tmp_path: Path) -> None:
    source = "prefixcache/v1/prefixcache.proto"
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", *outputs, source],
        check=True,
    )
    made = sorted((tmp_path / "prefixcache" / "v1").iterdir())
    assert len(made) == 3
    for path in made:
        committed = ROOT / "prefixcache" / "v1" / path.name
        assert path.read_text() == committed.read_text(), f"run `make proto`: {path.name} is stale"


def test_every_enum_starts_with_unspecified_and_every_rpc_has_its_own_messages() -> None:
    from prefixcache.v1 import prefixcache_pb2 as pb

    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED")
    (service,) = pb.DESCRIPTOR.services_by_name.values()
    used = [m.name for rpc in service.methods for m in (rpc.input_type, rpc.output_type)]
    assert len(used) == len(set(used))


def test_every_command_in_the_readme_exists() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        return  # a checkout in the making
    blocks = "\n".join(
        re.findall(r"```(?:sh|bash|console|text)?\n(.*?)```", readme.read_text(), re.S)
    )
    plugged = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    commands = {
        "serve",
        "stat",
        "lookup",
        "explain",
        "reset",
        "pin",
        "unpin",
        "quota",
        *plugged["prefixcache.commands"],
    }
    for command in re.findall(r"^(?:\$ )?prefixcache ([a-z]+)", blocks, re.M):
        assert command in commands, command
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"^(?:\$ )?make ([a-z]+)", blocks, re.M):
        assert target in targets, target


def test_nobody_is_sent_to_an_index_for_a_name_that_is_not_ours_there() -> None:
    texts = [path for _, path in modules()] + [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for path in texts:
        found = re.findall(r"pip install\s+[\"']?prefixcache\b(?!-[\d.]+-py3)", path.read_text())
        assert not found, f"{path}: how_to_install names what is missing"
