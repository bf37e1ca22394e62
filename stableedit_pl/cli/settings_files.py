"""Configuration files before they are parsed: what is wrong with them by file and line, and where a setting stands."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

GROUPS = ("model", "data", "trainer")
"""Settings that are groups of settings."""


class ArgumentsError(ValueError):
    """Arguments or configuration files that cannot be what was meant; exit code 2."""


def named_files(arguments: Sequence[str]) -> list[Path]:
    """The files that ``--config`` names, in their order."""
    files = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            if not (value if equals else following):
                raise ArgumentsError(f"{name} needs a value: {name} FILE")
            files.append(Path(value if equals else following))
    return files


def read_nodes(file: Path) -> yaml.MappingNode:
    """A file's settings as nodes, which know their lines.

    Raises:
        ArgumentsError: if it cannot be read or holds anything but settings; with file and line.
    """
    if file.is_dir():
        raise ArgumentsError(f"--config {file} is a directory: give a file in it")
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ArgumentsError(
            f"--config {file}: there is no such file; a relative path starts at {Path.cwd()}"
        ) from None
    except OSError as error:
        raise ArgumentsError(f"--config {file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArgumentsError(
            f"--config {file} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ArgumentsError(f"{file}{place}: is no valid YAML ({reason})") from error
    if root is None:
        raise ArgumentsError(f"{file} is empty: write settings into it, or leave --config out")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else f"the text {str(root.value)[:40]!r}"
        raise ArgumentsError(f"{file} holds {kind}, not settings: write them as   model: {{step_size: 1.0e-6}}")
    return root


def check_files(arguments: Sequence[str]) -> list[tuple[Path, yaml.MappingNode]]:
    """Read all files that ``--config`` names.

    Returns:
        Each with its settings.

    Raises:
        ArgumentsError: if one is no file of settings, gives a setting twice, or one value for a whole group.
    """
    read = [(file, read_nodes(file)) for file in named_files(arguments)]
    for file, root in read:
        _refuse_twice(file, root)
        for key, value in root.value:
            group = key.value in GROUPS and isinstance(value, yaml.ScalarNode)
            if group and value.tag != "tag:yaml.org,2002:str":
                raise ArgumentsError(
                    f"{file}, line {value.start_mark.line + 1}: {key.value} is {value.value or 'null'}, but it is a "
                    "group of settings"
                )
    return read


def _refuse_twice(file: Path, node: yaml.Node, name: str = "") -> None:
    if isinstance(node, yaml.SequenceNode):
        for element in node.value:
            _refuse_twice(file, element, name)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            full = f"{name}.{key.value}" if name else str(key.value)
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ArgumentsError(
                    f"{file}, line {line}: {full} stands there twice (also in line {lines[key.value]}), and only one "
                    "can be meant"
                )
            lines[key.value] = line
            _refuse_twice(file, value, full)


def lookup(root: yaml.Node, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    """The nodes of a setting's name and value; dots lead into groups, and ``name+`` is found as ``name``."""
    head, _, rest = name.partition(".")
    for key, value in root.value if isinstance(root, yaml.MappingNode) else []:
        if key.value == name or str(key.value).rstrip("+") == name:
            return key, value
        if rest and key.value == head and (found := lookup(value, rest)):
            return found
    return None


def scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """All scalars in a node, keys and values."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    for child in node.value if isinstance(node, yaml.CollectionNode) else []:
        for part in child if isinstance(child, tuple) else (child,):
            yield from scalars(part)


def dropped_callbacks(files: Sequence[tuple[Path, yaml.Node]]) -> Iterator[str]:
    """A sentence for each file whose ``callbacks:`` drops those of the files before it."""
    standing: dict[str, Path] = {}
    for file, root in files:
        adds = lookup(root, "trainer.callbacks+")
        replaces = None if adds else lookup(root, "trainer.callbacks")
        if replaces:
            own = callback_names(replaces[1])
            dropped = [name for name in standing if name not in own]
            if dropped:
                before = ", ".join(dict.fromkeys(str(standing[name]) for name in dropped))
                yield (
                    f"{file}, line {replaces[0].start_mark.line + 1}: callbacks: replaces the list of {before} and "
                    f"drops {', '.join(dropped)}; callbacks+: would add to it"
                )
            standing = dict.fromkeys(own, file)
        elif adds:
            standing |= dict.fromkeys(callback_names(adds[1]), file)


def callback_names(node: yaml.Node) -> list[str]:
    """Class names in the value of ``callbacks``: one, or a list, each a name or with a ``class_path``."""
    names = []
    for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        path = lookup(item, "class_path")
        named = path[1] if path else item
        if isinstance(named, yaml.ScalarNode) and named.value and named.tag != "tag:yaml.org,2002:null":
            names.append(str(named.value).rpartition(".")[2])
    return names
