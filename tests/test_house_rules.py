"""The house rules that a machine can check. Each rule is a function from a source file to its
findings, and has a canary: a snippet that breaks it and must be found, so that a rule cannot die
unseen.
"""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("storage", "protocol", "daemon")
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 600
LINE_COLUMNS_MAX = 100
# What tools read, with its reason, may stand beyond that.
PRAGMA = re.compile(r"\s+# (noqa|type:).*$")

# What each layer must not import: `storage` and `protocol` know nothing of each other nor of the
# process around them, and `protocol` is sans-IO: no event loop, no sockets, no clock.
FORBIDDEN_IMPORTS = {
    "storage": {"protocol", "daemon", "structlog", "click", "rich", "uvloop"},
    "protocol": {
        "storage",
        "daemon",
        "asyncio",
        "socket",
        "ssl",
        "select",
        "selectors",
        "threading",
        "time",
        "datetime",
        "uvloop",
        "structlog",
    },
    "daemon": set(),
}
# Calls with the reason against each. Keys are dotted names as written.
BANNED_CALLS = {
    "asyncio.get_event_loop": "deprecated; get_running_loop",
    "asyncio.ensure_future": "create_task, and keep the task",
    "os.system": "subprocess with a list of arguments",
    "eval": "never",
    "exec": "never",
    "pickle.loads": "runs what it reads",
    "time.time": "monotonic for durations, time_ns for timestamps",
    "print": "the log, click.echo, or a return value",
}
PRINTERS = {"daemon/demo.py"}  # programs for people


class Source(NamedTuple):
    path: str
    text: str
    tree: ast.Module

    @property
    def layer(self) -> str:
        return self.path.split("/", 1)[0]


Rule = Callable[[Source], Iterator[str]]


def parse(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text))


def functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imports(source: Source) -> Iterator[tuple[int, str]]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def functions_are_short(source: Source) -> Iterator[str]:
    for node in functions(source):
        assert node.end_lineno is not None
        lines = node.end_lineno - node.lineno + 1
        if lines > FUNCTION_LINES_MAX:
            yield f"{node.lineno}: {node.name} has {lines} lines ({FUNCTION_LINES_MAX})"


def files_are_short(source: Source) -> Iterator[str]:
    lines = source.text.count("\n")
    if lines > FILE_LINES_MAX:
        yield f"{lines} lines ({FILE_LINES_MAX})"


def functions_are_typed(source: Source) -> Iterator[str]:
    if source.layer not in LAYERS:
        return
    for node in functions(source):
        if node.returns is None and node.name != "__init__":
            yield f"{node.lineno}: {node.name} has no return type"


def layers_hold(source: Source) -> Iterator[str]:
    forbidden = FORBIDDEN_IMPORTS.get(source.layer, set())
    for line, module in imports(source):
        top = module.split(".", 1)[0]
        if top in forbidden:
            yield f"{line}: {source.layer} imports {module}"
        elif top == "tests" and source.layer in LAYERS:
            yield f"{line}: imports {module}"


def calls_are_allowed(source: Source) -> Iterator[str]:
    if source.layer not in LAYERS:
        return
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in BANNED_CALLS and not (name == "print" and source.path in PRINTERS):
            yield f"{node.lineno}: {name}: {BANNED_CALLS[name]}"


def exceptions_are_not_swallowed(source: Source) -> Iterator[str]:
    """`except SomethingNarrow: pass` may be right; everything that is caught broadly must be dealt
    with.
    """
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = "everything" if node.type is None else ast.unparse(node.type)
        silent = all(
            isinstance(line, ast.Pass)
            or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            for line in node.body
        )
        if node.type is None or (silent and re.search(r"\b(Base)?Exception\b|\bOSError\b", caught)):
            yield f"{node.lineno}: except {caught} is swallowed"


def nothing_is_unfinished(source: Source) -> Iterator[str]:
    if source.path == "tests/test_house_rules.py":
        return
    for number, line in enumerate(source.text.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError", line):
            yield f"{number}: {line.strip()[:100]}"


def no_test_is_skipped(source: Source) -> Iterator[str]:
    """A test that the machine cannot run says so by the markers ``client`` and ``needs``, which CI
    turns into failures.
    """
    if source.path in {"tests/conftest.py", "tests/test_house_rules.py"}:
        return
    for number, line in enumerate(source.text.splitlines(), 1):
        if re.search(r"pytest\.(mark\.)?(skip|xfail|importorskip)|unittest\.skip", line):
            yield f"{number}: {line.strip()[:100]}"


def packages_say_what_they_are(source: Source) -> Iterator[str]:
    if source.layer in LAYERS and not ast.get_docstring(source.tree):
        yield "1: no module docstring"


def text_is_plain(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        columns = len(PRAGMA.sub("", line))
        if columns > LINE_COLUMNS_MAX:
            yield f"{number}: {columns} columns ({LINE_COLUMNS_MAX})"
        if line.rstrip() != line or "\t" in line:
            yield f"{number}: trailing blank or tab"


CANARIES: list[tuple[Rule, str, str]] = [
    (functions_are_short, "daemon/a.py", "def f() -> None:\n" + "    f()\n" * FUNCTION_LINES_MAX),
    (files_are_short, "daemon/a.py", "a = 1\n" * (FILE_LINES_MAX + 1)),
    (functions_are_typed, "storage/a.py", "def f():\n    return 1\n"),
    (layers_hold, "storage/a.py", "from protocol.iscsi import pdu\n"),
    (layers_hold, "protocol/a.py", "import asyncio\n"),
    (layers_hold, "daemon/a.py", "import tests.daemon\n"),
    (calls_are_allowed, "daemon/a.py", "print(1)\n"),
    (
        exceptions_are_not_swallowed,
        "storage/a.py",
        "try:\n    f()\nexcept (ValueError, Exception):\n    pass\n",
    ),
    (exceptions_are_not_swallowed, "tests/a.py", "try:\n    f()\nexcept:\n    g()\n"),
    (nothing_is_unfinished, "storage/a.py", "a = 1  # TO" + "DO later\n"),
    (no_test_is_skipped, "tests/a.py", "@pytest.mark.skip\ndef f():\n    assert g()\n"),
    (packages_say_what_they_are, "storage/__init__.py", "a = 1\n"),
    (text_is_plain, "daemon/a.py", "a = 1 \n"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in CANARIES))


def project_files() -> list[str]:
    """Tracked files and those not ignored, so that the rules hold before a commit too."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = (
        listed.stdout.split()
        if listed.returncode == 0
        else [
            str(path.relative_to(ROOT))
            for layer in (*LAYERS, "tests")
            for path in (ROOT / layer).rglob("*.py")
        ]
    )
    return [name for name in names if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    found = [parse(name, (ROOT / name).read_text()) for name in project_files()]
    assert len(found) > 5
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule, sources: list[Source]) -> None:
    findings = [f"{source.path}:{finding}" for source in sources for finding in rule(source)]
    assert not findings, "\n".join(findings)


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    CANARIES,
    ids=[f"{rule.__name__}-{path}" for rule, path, _ in CANARIES],
)
def test_rule_finds_its_canary(rule: Rule, path: str, text: str) -> None:
    assert list(rule(parse(path, text)))


def test_no_module_is_dead(sources: list[Source]) -> None:
    """Every module of the layers is imported by another module of the layers, or is a program's
    entry point.
    """
    entry_points = {"daemon.cli", "daemon.admin.cli", "daemon.demo"}
    modules = {
        source.path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): source
        for source in sources
        if source.layer in LAYERS
    }
    used = {name for source in modules.values() for _, name in imports(source)}
    packages = {name for name, source in modules.items() if source.path.endswith("__init__.py")}
    assert sorted(set(modules) - packages - used - entry_points) == []


def test_every_package_and_test_folder_has_an_init(sources: list[Source]) -> None:
    paths = {source.path for source in sources}
    folders = {path.rsplit("/", 1)[0] for path in paths if "/" in path}
    assert sorted(folder for folder in folders if f"{folder}/__init__.py" not in paths) == []
