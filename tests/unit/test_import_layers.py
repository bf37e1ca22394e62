"""Imports point one way: a table says which wing may see which; heavy libraries are imported where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stableedit_pl

PACKAGE = Path(stableedit_pl.__file__).parent

BELOW_RUN = {"data", "model", "devices", "method", "demo", "errors"}
MAY_SEE: dict[str, set[str]] = {
    "__main__": {"cli"},
    "cli": {"trainer", "callbacks", "tune", "editor", "run", *BELOW_RUN},
    "trainer": {"callbacks", "tune", "editor", "run", *BELOW_RUN},
    "tune": {"editor", "run", *BELOW_RUN},
    "callbacks": {"editor", "run", *BELOW_RUN},
    "editor": {"run", *BELOW_RUN},
    "run": BELOW_RUN,
    "data": {"model", "method", "devices", "demo", "errors"},
    "model": {"devices", "method", "demo", "errors"},
    "devices": {"method", "errors"},
    "method": {"errors"},
    "demo": set(),
    "errors": set(),
}
"""Wings, and the modules of the package's root, each with what it may import besides itself."""

USERS_NAMES = {"__init__", "__main__", "editor", "trainer", "errors"}
"""Modules that may stand in the package's root."""

MOST_MODULES = 16
"""In one folder: more are a folder that needs folders."""

LIGHTNING = {
    *("cli.edit_cli", "trainer", "callbacks", "editor", "run.results", "run.curves", "run.guards", "run.scored_model"),
    *("run.files.checkpoint_io", "data.stream", "model.editable_model", "devices.rank_strategy"),
    *("devices.sharded_strategy", "run.logger_history"),
}
TRANSFORMERS = {"model.loading", "model.asking", "model.sites", "model.files.base_files"}
TORCHMETRICS = {"model.scoring"}
TORCH_FREE = {
    *("cli.command", "cli.front_page", "cli.screen", "cli.plain_verbs", "cli.edit_cli", "data.readers"),
    *("cli.interrupts", "cli.named_callbacks", "cli.parse_errors", "cli.settings_files"),
    *("data.records", "data.record_encoding", "data.row_digest", "demo", "errors", "model.micro_batches"),
    *("devices.rank_watch", "run.report", "run.stop_signals", "run.slurm", "run.freed_memory", "run.curves"),
    *("run.guards", "run.scored_model", "run.files.directory", "run.files.integrity", "run.files.ledger"),
    *("run.files.plain", "run.files.results_file", "run.files.lock", "run.files.opening", "run.logger_history"),
    *("__main__", "trainer"),
}
"""Which modules may import what; a module that is not torch-free may import torch."""


def files() -> Iterator[Path]:
    """All modules of the package."""
    yield from sorted(file for file in PACKAGE.rglob("*.py") if "callbacks" not in file.relative_to(PACKAGE).parts)
    yield from sorted((PACKAGE / "callbacks").resolve().glob("*.py"))  # rglob does not follow the symlink


def name_of(file: Path) -> str:
    """A file's module, without the package's name; a door's is its folder's."""
    inside = file.is_relative_to(PACKAGE)
    parts = (file.relative_to(PACKAGE) if inside else Path("callbacks") / file.name).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of all imported modules, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively"
            assert node.module is not None
            if node.module == "stableedit_pl":
                yield from ((node.lineno, f"stableedit_pl.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def against_the_rules(file: Path) -> Iterator[str]:
    """What a file imports although its wing may not: file, line and rule."""
    wing = name_of(file).partition(".")[0]
    for line, name in imports(file):
        package, _, rest = name.partition(".")
        if package == "callbacks":
            yield f"{file}:{line} imports {name}: a second module beside stableedit_pl.callbacks"
        elif package == "stableedit_pl" and rest and rest != "__version__":
            other = rest.partition(".")[0]
            if other != wing and other not in MAY_SEE[wing]:
                allowed = ", ".join(sorted(MAY_SEE[wing])) or "nothing"
                yield f"{file}:{line} imports {name}, but {wing} may see {allowed}"


FILES = [file for file in files() if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_wings_see_only_what_is_below_them(file: Path) -> None:
    broken = list(against_the_rules(file))
    assert not broken, "\n".join(broken)


def test_an_import_against_the_table_is_named_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "method").mkdir()
    file = tmp_path / "method" / "new.py"
    file.write_text("import torch\n\n\ndef late():\n    from stableedit_pl.run.files import ledger\n")
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    assert list(against_the_rules(file)) == [
        f"{file}:5 imports stableedit_pl.run.files, but method may see errors",
    ]


def test_the_table_has_no_circle_and_no_name_that_is_gone() -> None:
    there = {name_of(file).partition(".")[0] for file in FILES}
    assert there == MAY_SEE.keys()
    order = list(MAY_SEE)
    for wing, seen in MAY_SEE.items():
        assert all(order.index(other) > order.index(wing) for other in seen), wing
    names = {name_of(file) for file in FILES}
    for module in (LIGHTNING | TRANSFORMERS | TORCHMETRICS | TORCH_FREE) - {"callbacks", "data.readers", "demo"}:
        assert module in names, f"{module} is gone"


def test_folders_stay_small_and_the_root_is_for_users_names() -> None:
    assert {file.stem for file in PACKAGE.glob("*.py")} == USERS_NAMES
    for folder in {file.parent for file in FILES}:
        modules = [file.stem for file in folder.glob("*.py") if file.stem != "__init__"]
        assert len(modules) <= MOST_MODULES, f"{folder} has {len(modules)} modules"


@pytest.mark.parametrize("wing", ["cli", "run", "run/files", "data", "model", "model/files", "devices", "method"])
def test_every_wing_has_a_door(wing: str) -> None:
    """What it is for, what it may import and in which order to read it, in at most ten lines; and no code."""
    tree = ast.parse((PACKAGE / wing / "__init__.py").read_text(encoding="utf-8"))
    said = ast.get_docstring(tree)
    assert said and len(tree.body) == 1 and len(said.splitlines()) <= 10 and "mport" in said
    for name in {word.strip("`,.():;") for word in said.split() if word.startswith(("``", "(``"))}:
        stems = {file.stem for file in PACKAGE.rglob("*.py")} | {"edits.jsonl", "results.json"} | MAY_SEE.keys()
        stems |= {folder.name for folder in PACKAGE.rglob("*") if folder.is_dir()} | {"--help", "stableedit"}
        assert name in stems, f"the door of {wing} names {name}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_heavy_libraries_are_imported_where_they_belong(file: Path) -> None:
    own = name_of(file)
    belongs = {own, own.partition(".")[0], own.rpartition(".")[0]}
    for line, name in imports(file):
        library = name.partition(".")[0]
        allowed = {"lightning": LIGHTNING, "transformers": TRANSFORMERS, "torchmetrics": TORCHMETRICS}.get(library)
        assert allowed is None or belongs & allowed, f"{file}:{line} imports {library}"
        assert library != "torch" or not belongs & TORCH_FREE, f"{file}:{line} imports torch"
        if own.startswith("method"):
            known = {*sys.stdlib_module_names, "torch", "stableedit_pl"}
            assert library in known, f"{file}:{line}: method is torch and nothing else"


@pytest.mark.parametrize(
    "module", ["", ".data.records", ".data.readers", ".errors", ".run.files.directory", ".demo", ".cli.command"]
)
def test_what_needs_no_torch_loads_none(module: str) -> None:
    """The readers are used by scripts that prepare data, and ``stableedit --help`` should not take seconds."""
    code = (
        f"import sys, stableedit_pl{module}; "
        "sys.exit(', '.join(m for m in ('torch', 'transformers', 'lightning') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"stableedit_pl{module} imports {done.stderr}"


def test_public_names_load_when_they_are_asked_for() -> None:
    for name in stableedit_pl.__all__:
        assert getattr(stableedit_pl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'StableEditor'"):
        stableedit_pl.StableEditor  # noqa: B018
