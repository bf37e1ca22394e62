"""Imports point one way: from the command line down to pure torch, and data files need neither torch nor models."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stableedit_pl

PACKAGE = Path(stableedit_pl.__file__).parent

LAYERS = [
    ["__main__"],
    ["cli"],
    ["edit_cli"],
    ["plain_verbs"],
    ["trainer", "export", "verify"],
    ["callbacks"],
    ["results"],
    ["editor", "stream"],
    ["loaders"],
    ["editable_model", "report", "curves", "guards", "checkpoint_io", "device_maps"],
    ["closed_form", "scoring", "shares", "division", "compatibility", "loading", "saved_state", "placement"],
    ["sharded_strategy"],
    ["capture", "planning", "memory", "turns", "record_encoding"],
    ["partial_forward", "lower_outputs", "rank_strategy", "rank_devices", "method"],
    ["statistics", "normalization", "sites", "encoding", "readers", "row_digest", "ledger"],
    ["checkpoint_file", "results_file", "front_page", "screen", "sharding"],
    ["lockstep"],
    ["weight_shards"],
    [
        "moments",
        "inverse_root",
        "workspace",
        "records",
        "run_directory",
        "stop_signals",
        "freed_memory",
        "micro_batches",
        "plain",
        "ranks",
        "demo",
    ],
    ["integrity", "ridge", "errors", "rank_watch", "slurm"],
]
"""Top to bottom. A module imports from layers below its own; files in callbacks/ and readers/ also from each other."""

LAYER = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}

LIGHTNING = {
    *("edit_cli", "trainer", "callbacks", "results", "editor", "stream", "editable_model", "curves", "guards"),
    *("checkpoint_io", "rank_strategy", "sharded_strategy"),
}
TRANSFORMERS = {"loading", "scoring", "sites"}
TORCH = {
    *("callbacks", "export", "results", "editor", "stream", "checkpoint_io", "closed_form", "scoring"),
    *(
        "compatibility",
        "loading",
        "capture",
        "planning",
        "method",
        "turns",
        "statistics",
        "normalization",
        "ridge",
        "sites",
    ),
    *("inverse_root", "workspace", "memory", "encoding", "moments", "loaders", "verify", "saved_state"),
    *("partial_forward", "lower_outputs", "checkpoint_file", "ranks", "rank_strategy", "shares"),
    *("division", "placement", "device_maps", "rank_devices"),
    *("sharding", "sharded_strategy", "weight_shards", "lockstep"),
}
"""Who may import what; everything else is for the standard library and this package alone."""


def modules() -> Iterator[tuple[str, Path]]:
    """Layer name of each file: a module's own, or that of the sub-package it is in."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], file
    for file in sorted((PACKAGE / "callbacks").resolve().glob("*.py")):  # rglob does not follow the symlink
        yield "callbacks", file


def imports(file: Path) -> Iterator[str]:
    """Full names of all imported modules, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively"
            assert node.module is not None
            if node.module == "stableedit_pl":
                yield from (f"stableedit_pl.{alias.name}" for alias in node.names)
            else:
                yield node.module


FILES = sorted(set(modules()))
IDS = [f"{layer}/{file.stem}" for layer, file in FILES]


def test_every_module_has_its_layer_and_every_layer_its_modules() -> None:
    assert {layer for layer, _ in FILES} == LAYER.keys()
    assert len(LAYER) == sum(map(len, LAYERS))
    assert sum(layer == "callbacks" for layer, _ in FILES) > 5 and sum(layer == "readers" for layer, _ in FILES) > 2


@pytest.mark.parametrize(("layer", "file"), FILES, ids=IDS)
def test_imports_point_down(layer: str, file: Path) -> None:
    for name in imports(file):
        package, _, rest = name.partition(".")
        if package == "callbacks":
            pytest.fail(f"{file.name} imports {name}: a second module beside stableedit_pl.callbacks")
        if package != "stableedit_pl" or rest in ("", "__version__"):
            continue
        other = rest.partition(".")[0]
        inside = other == layer and layer in ("callbacks", "readers")
        assert inside or LAYER[other] > LAYER[layer], f"{file.name} ({layer}) imports {name} from above or beside it"


@pytest.mark.parametrize(("layer", "file"), FILES, ids=IDS)
def test_heavy_libraries_are_imported_where_they_belong(layer: str, file: Path) -> None:
    allowed = {"lightning": LIGHTNING, "transformers": TRANSFORMERS, "torch": TORCH, "torchmetrics": {"scoring"}}
    for name in imports(file):
        library = name.partition(".")[0]
        if library in allowed:
            assert layer in allowed[library], f"{file.name} ({layer}) imports {library}"


@pytest.mark.parametrize("module", ["", ".records", ".readers", ".errors", ".run_directory", ".demo"])
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


def test_the_rule_would_notice_an_import_from_above(tmp_path: Path) -> None:
    """Negative control: also one that hides inside a function."""
    file = tmp_path / "moments.py"
    file.write_text("def f():\n    from stableedit_pl.editor import LifelongEditor\n")
    with pytest.raises(AssertionError, match="from above"):
        test_imports_point_down("moments", file)
    file.write_text("from callbacks.warm_up import WarmUp\n")
    with pytest.raises(pytest.fail.Exception):
        test_imports_point_down("cli", file)
    file.write_text("import torch.nn\n")
    with pytest.raises(AssertionError, match="imports torch"):
        test_heavy_libraries_are_imported_where_they_belong("records", file)
