"""The run directory: everything a run writes lies directly in here, under these names."""

import logging
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from stableedit_pl.run.files.integrity import damage

log = logging.getLogger(__name__)

LAST = "last"
"""What ``--ckpt_path`` says to mean the newest checkpoint of the run directory."""


class RunDirectoryError(ValueError):
    """A run directory that cannot be used as asked; the message says what to do."""


@dataclass(frozen=True)
class Purpose:
    """What a checkpoint is wanted for, so that a message speaks of what was asked.

    Attributes:
        option: the option that names the checkpoint or its run; ``{path}`` stands for the run directory.
        nothing: what cannot be done without one.
        remedy: what to do then.
    """

    option: str
    nothing: str
    remedy: str


RESUME = Purpose(
    "--ckpt_path last",
    "there is nothing to resume",
    "Check --run_dir, or start the run again with --overwrite true and without --ckpt_path.",
)
ASK = Purpose(
    "--ckpt_path last",
    "there is no edited model to ask",
    "Check --run_dir, or leave out --ckpt_path to ask the base model.",
)
EXPORT = Purpose(
    "--run {path}", "there is nothing to export", "Give the directory of an edit run, what was its --run_dir."
)
FORK = Purpose(
    "--fork_from {path}",
    "there is nothing to start from",
    "Give the directory of an edit run, or one of its checkpoints; leave out --fork_from to start from the base model.",
)


class RunDirectory:
    """Names of a run's files, and the rules for starting and resuming in it.

    Args:
        path: the directory; need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        """See the class."""
        self.path = Path(path).expanduser()
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.statistics = self.path / "statistics.safetensors"
        self.ledger = self.path / "edits.jsonl"
        self.rejected = self.path / "rejected.jsonl"
        self.results = self.path / "results.json"
        self.predictions = self.path / "predictions.jsonl"
        self.lock = self.path / ".lock"

    def predictions_of(self, ckpt_path: str | Path | None) -> Path:
        """Where the answers of a checkpoint go: none overwrites those of another, or of the base model.

        Args:
            ckpt_path: as in :meth:`checkpoint`; None is the base model.
        """
        if ckpt_path is None:
            return self.path / "predictions-base.jsonl"
        stem = Path(ckpt_path).stem
        return self.predictions if stem == LAST else self.path / f"predictions-{stem}.jsonl"

    def holds_run(self) -> bool:
        """Whether a run has applied edits here; one that failed before its first turn leaves nothing worth keeping."""
        return self.last_checkpoint.exists() or (self.ledger.exists() and self.ledger.stat().st_size > 0)

    def checkpoint(self, ckpt_path: str | Path | None, purpose: Purpose = RESUME) -> Path | None:
        """The file that ``ckpt_path`` means.

        Args:
            ckpt_path: None, ``last``, or a file.
            purpose: what it is wanted for.

        Raises:
            RunDirectoryError: if there is no such checkpoint, or none that is whole. Starting over silently would
                apply every edit to the unedited model a second time.
        """
        if ckpt_path is None:
            return None
        if not str(ckpt_path):
            raise RunDirectoryError("--ckpt_path is empty: give last or a checkpoint file, or leave it out")
        if ckpt_path == LAST:
            return self._newest_whole(purpose)
        file = Path(ckpt_path).expanduser()
        said = f"--fork_from {ckpt_path}" if purpose is FORK else f"--ckpt_path {ckpt_path}"
        if not file.is_file():
            what = "it is a directory, not a checkpoint file" if file.is_dir() else "there is no such file"
            raise RunDirectoryError(f"{said}: {what}. {self._checkpoints_here()}".rstrip())
        problem = damage(file)
        if problem is not None:
            way = "Its directory" if purpose is FORK else "--ckpt_path last"
            raise RunDirectoryError(f"{said} is damaged: {problem}. {way} finds one that is not.")
        return file

    def _checkpoints_here(self) -> str:
        here = [file.name for file in self.turn_checkpoints()]
        return f"{self.checkpoints} has {', '.join(here)}." if here else ""

    def turn_checkpoints(self) -> list[Path]:
        """The files ``turn=<n>.ckpt``, newest first."""
        numbered = [file for file in self.checkpoints.glob("turn=*.ckpt") if file.stem[len("turn=") :].isdigit()]
        return sorted(numbered, key=lambda file: int(file.stem[len("turn=") :]), reverse=True)

    def _newest_whole(self, purpose: Purpose) -> Path:
        """``last.ckpt``, or the newest checkpoint before it that is not damaged."""
        option = purpose.option.format(path=self.path)
        candidates = [file for file in (self.last_checkpoint, *self.turn_checkpoints()) if file.is_file()]
        if not candidates:
            what = "has no checkpoint" if self.path.exists() else "does not exist"
            where = "" if str(self.path) in option else f"{self.path} "
            raise RunDirectoryError(f"{option}: {where}{what}, so {purpose.nothing}. {purpose.remedy}")
        problems = []
        for file in candidates:
            problem = damage(file)
            if problem is None:
                return file
            problems.append(f"{file.name}: {problem}")
            log.warning("%s is damaged: %s. Trying the one before it.", file, problem)
        raise RunDirectoryError(
            f"{option}: every checkpoint in {self.checkpoints} is damaged ("
            + "; ".join(problems)
            + f"), so {purpose.nothing}. Put back a copy of one of them."
            + (" " + purpose.remedy.replace("Check --run_dir, or start", "Or start") if purpose is RESUME else "")
        )

    def make(self) -> list[Path]:
        """Make the directory.

        Returns:
            The directories that were made, outermost first; empty if all were there.

        Raises:
            RunDirectoryError: if nothing can be written here, or the name has a variable of the shell in it.
        """
        if not self.path.exists() and os.path.expandvars(self.path) != str(self.path):
            raise RunDirectoryError(
                f"--run_dir {self.path} has a $ that no shell has replaced: write the directory itself, or "
                "${oc.env:HOME} for $HOME."
            )
        made: list[Path] = []
        try:
            missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                made.append(folder)
            reason = None if os.access(self.path, os.W_OK | os.X_OK) else "permission denied"
            if reason is None and not self.path.is_dir():
                reason = "it is a file"
        except OSError as error:
            reason = error.strerror or str(error)
        if reason is not None:
            remove_empty(made)
            raise RunDirectoryError(
                f"--run_dir {self.path} cannot be written ({reason}): choose another place, or give yourself the right "
                "to write there (chmod u+wx)."
            )
        return made

    def refuse(self, resuming_from: Path | None, overwrite: bool) -> None:
        """Refuse a start that does not fit what is here.

        Args:
            resuming_from: the checkpoint a run goes on from; None for a new run.
            overwrite: the run that is here may be replaced.

        Raises:
            RunDirectoryError: if a new run would overwrite one, or a resumed one would go on elsewhere.
        """
        if resuming_from is not None:
            if resuming_from.resolve().parent != self.checkpoints.resolve():
                raise RunDirectoryError(
                    f"--ckpt_path {resuming_from} belongs to the run in {resuming_from.resolve().parent.parent}, but "
                    f"--run_dir is {self.path}. A run is resumed where it was: set --run_dir to that directory."
                )
        elif not overwrite and self.holds_run():
            raise RunDirectoryError(
                f"{self.path} already holds a run. Resume it with --ckpt_path last, choose another --run_dir, "
                "or replace it with --overwrite true."
            )

    def next_config(self) -> Path:
        """``config.yaml``, or ``config-2.yaml`` and so on for the settings of a resumed run."""
        candidate, number = self.config, 2
        while candidate.exists():
            candidate, number = self.path / f"config-{number}.yaml", number + 1
        return candidate

    def own_files(self) -> list[Path]:
        """The files a run writes that are here, by their names."""
        own = [self.config, self.statistics, self.ledger, self.rejected, self.results, self.predictions]
        own.append(self.path / "hparams.yaml")
        own += [file for file in self.path.glob("config-*.yaml") if re.fullmatch(r"config-\d+", file.stem)]
        own += [self.path / "predictions-base.jsonl", *self.path.glob("predictions-turn=*.jsonl")]
        own += self.path.glob("events.out.tfevents.*")
        own += [self.last_checkpoint, *self.checkpoints.glob("turn=*.ckpt"), *self.checkpoints.glob(".*.ckpt.tmp")]
        return [file for file in own if file.exists()]

    def clear(self, but: Collection[Path] = ()) -> None:
        """Remove the files a run writes; anything else in the directory stays.

        Args:
            but: files that stay as well.
        """
        for file in self.own_files():
            if file not in but:
                file.unlink(missing_ok=True)
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, given outermost first, as far as nothing is in them."""
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError:
            return


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a small file so that a reader, or a crash, sees the old content or the new, never a piece."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        flush_to_disk(file.fileno())
    temporary.replace(path)
    flush_directory(path.parent)


def flush_to_disk(descriptor: int) -> None:
    """Wait until the operating system has written a file."""
    os.fsync(descriptor)


def flush_directory(path: Path) -> None:
    """Make a rename in ``path`` durable (a no-op where directories cannot be opened)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
