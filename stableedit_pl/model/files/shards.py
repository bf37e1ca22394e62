"""One file of weights: what tensors it holds, and the same file with some of them exchanged."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Wanted = Callable[[str], torch.dtype | None]
"""A tensor's name in a file to the floating-point type it is written in; None for its own."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the floating-point types that models are edited in."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file.

    Attributes:
        name: its name there.
        shape: its shape.
        dtype: its floating-point type; None for integers, booleans and types that nobody edits in.
        place: first byte in the file, and the one after the last; None where the file does not lay them out plainly.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    place: tuple[int, int] | None = None


class Shard(ABC):
    """A file of weights.

    Attributes:
        file: where it lies.
        tensors: what it holds.
    """

    file: Path
    tensors: list[Stored]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""

    @abstractmethod
    def write(self, target: Path, changes: Mapping[str, Tensor], wanted: Wanted) -> int:
        """Write the file with some tensors exchanged.

        Args:
            target: where to.
            changes: name in the file to what takes its place, same shape. It is written in the old one's type, or in
                its own where that would round it.
            wanted: what floating-point tensors are written in.

        Returns:
            Bytes of all tensors.
        """


class SafetensorsShard(Shard):
    """A safetensors file; exchanged in place in a copy, where types stay as they are."""

    def __init__(self, file: Path) -> None:
        """Read the header of ``file``."""
        self.file = file
        with file.open("rb") as opened:
            begin = 8 + int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(begin - 8))
        self.metadata = header.pop("__metadata__", None)
        self.tensors = [
            Stored(
                name,
                tuple(one["shape"]),
                _DTYPES.get(one["dtype"]),
                (begin + one["data_offsets"][0], begin + one["data_offsets"][1]),
            )
            for name, one in header.items()
        ]

    def read(self, name: str) -> Tensor:
        """See the class above."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(name)  # type: ignore[no-any-return]

    def write(self, target: Path, changes: Mapping[str, Tensor], wanted: Wanted) -> int:
        """See the class above."""
        stored = {one.name: one for one in self.tensors}
        new = {name: _fitting(tensor, stored[name].dtype, wanted(name)) for name, tensor in changes.items()}
        recast = any(one.dtype is not None and wanted(one.name) not in (None, one.dtype) for one in self.tensors)
        if not recast and all(tensor.dtype == stored[name].dtype for name, tensor in new.items()):
            shutil.copyfile(self.file, target)
            with target.open("r+b") as opened:
                for name, tensor in new.items():
                    place = stored[name].place
                    assert place is not None
                    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                    assert len(content) == place[1] - place[0]
                    opened.seek(place[0])
                    opened.write(content)
            return sum(one.place[1] - one.place[0] for one in self.tensors if one.place is not None)
        with safe_open(self.file, framework="pt") as opened:
            whole = {
                one.name: new[one.name] if one.name in new else _cast(opened.get_tensor(one.name), wanted(one.name))
                for one in self.tensors
            }
        save_file(whole, target, self.metadata)
        target.chmod(0o644)  # safetensors writes weights that only their owner can read
        return sum(tensor.nbytes for tensor in whole.values())


class PickledShard(Shard):
    """A file of ``torch.save``; read without executing code, and written whole. Tensors that share memory go on to."""

    def __init__(self, file: Path) -> None:
        """Read ``file``."""
        self.file = file
        self._content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        self.tensors = [
            Stored(name, tuple(one.shape), one.dtype if one.is_floating_point() else None)
            for name, one in self._content.items()
            if isinstance(one, Tensor)
        ]

    def read(self, name: str) -> Tensor:
        """See the class above."""
        return self._content[name]  # type: ignore[no-any-return]

    def write(self, target: Path, changes: Mapping[str, Tensor], wanted: Wanted) -> int:
        """See the class above."""
        whole, recast = dict(self._content), dict[tuple[Any, ...], Tensor]()
        for one in self.tensors:
            old = self._content[one.name]
            if one.name in changes:
                whole[one.name] = _fitting(changes[one.name], one.dtype, wanted(one.name))
            elif one.dtype is not None and wanted(one.name) not in (None, one.dtype):
                key = (old.data_ptr(), old.shape, old.stride(), wanted(one.name))
                whole[one.name] = recast.setdefault(key, _cast(old, wanted(one.name)))
        torch.save(whole, target)
        return sum(one.nbytes for one in whole.values() if isinstance(one, Tensor))


def open_shard(file: Path) -> Shard:
    """The shard in a file, by its suffix."""
    return SafetensorsShard(file) if file.suffix == ".safetensors" else PickledShard(file)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.dtype in _DTYPES.values() else tensor


def _fitting(tensor: Tensor, stored: torch.dtype | None, dtype: torch.dtype | None) -> Tensor:
    """An edited tensor in the type asked for, or the stored one's, or its own where that would round it."""
    if dtype is not None:
        return tensor.to(dtype)
    fitting = tensor if stored is None else tensor.to(stored)
    return fitting if torch.equal(fitting.to(tensor.dtype), tensor) else tensor
