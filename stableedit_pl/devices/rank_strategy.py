"""What ``strategy: ddp`` means for an edit stream: ranks that share each turn and never a gradient."""

import atexit
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.nn import Module

from stableedit_pl.devices import ranks
from stableedit_pl.devices.rank_watch import RankWatch

log = logging.getLogger(__name__)

LAUNCHED_BY = "STABLEEDIT_LAUNCHED_BY"
"""Environment variable: process id of the rank 0 that started this process."""


class WatchedRanks(ParallelStrategy):
    """Processes that are started together, watch one another, and stop together: what our strategies share.

    Args:
        rank_timeout: seconds that ranks wait for one another before they stop; a rank that gives no sign of life is
            noticed within a fifth of it, a minute at most.
        kwargs: as for the Lightning strategy that stands behind this one in the order of inheritance.
    """

    num_nodes: int
    num_processes: int

    def __init__(self, rank_timeout: float = 600.0, **kwargs: Any) -> None:
        """See the class."""
        super().__init__(timeout=timedelta(seconds=rank_timeout), **kwargs)  # type: ignore[call-arg]
        self.silence = min(rank_timeout / 5, 60.0)
        self._watch: RankWatch | None = None

    def _configure_launcher(self) -> None:
        """Start the other ranks of this machine as Lightning does, and answer for them."""
        assert self.cluster_environment is not None
        self._launcher = RankLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        """Meet the other ranks, once, and watch them from then on."""
        if self._watch is not None:
            return
        _follow_the_launcher()
        with ranks.noticing_losses():
            self._meet()
        if ranks.world() > 1:
            store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            store.set_timeout(timedelta(seconds=self.silence))
            self._watch = RankWatch(store, ranks.rank(), ranks.world(), self.silence)
            self._watch.start()
            ranks.watch_with(self._watch)
            atexit.unregister(_hang_up)
            atexit.register(_hang_up)

    def _meet(self) -> None:
        ranks.team_up([])  # not when the ranks part: predictions are gathered after that
        super().setup_environment()

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks.

        Raises:
            RanksError: if one is lost.
        """
        with ranks.noticing_losses():
            super().barrier(*args, **kwargs)  # type: ignore[safe-super]

    def on_exception(self, exception: BaseException) -> None:
        """Tell the others why this rank stops."""
        if isinstance(exception, ranks.RanksError):
            atexit.unregister(_hang_up)  # it could wait for those that are lost
        if self._watch is not None:
            self._watch.leave(str(exception).splitlines()[0] if str(exception) else type(exception).__name__)
            if ranks.rank() == 0 and isinstance(exception, ranks.RanksError):
                self._watch.wait_for_others()

    def teardown(self) -> None:
        """Part from the others."""
        if self._watch is not None:
            self._watch.leave()
            ranks.watch_with(None)
            self._watch = None
        super().teardown()


def _hang_up() -> None:
    """Close the connections to the other ranks before the interpreter ends: gloo's threads must not outlive it."""
    if dist.is_initialized():
        dist.destroy_process_group()


class RankStrategy(WatchedRanks, DDPStrategy):
    """One process per device, each with the whole model, none wrapped: there is no gradient to reduce.

    Lightning's own wraps the model in ``DistributedDataParallel``, which refuses one without gradients.
    Arguments as for :class:`WatchedRanks` and Lightning's ``DDPStrategy``.
    """

    def setup(self, trainer: Any) -> None:
        """Place the model; every rank has loaded the same files, so nothing is sent."""
        super(DDPStrategy, self).setup(trainer)

    def _setup_model(self, model: Module) -> Module:  # type: ignore[override]
        """The model as it is."""
        return model


class RankLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine, and sees to it that none outlives the run.

    Lightning's own kills rank 0 outright within five seconds of another's end, before it can save or say anything.
    """

    GRACE = 30.0
    """Seconds that the ranks have to stop on their own after one of them has failed."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the ranks, then call ``function``."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally and not self.procs:
            os.environ[LAUNCHED_BY] = str(os.getpid())
            self._call_children_scripts()
            atexit.register(self._see_them_off)
            threading.Thread(target=self._stand_by, daemon=True, name="rank launcher").start()
        return function(*args, **kwargs)

    def _stand_by(self) -> None:
        """End everything when a rank has failed and rank 0 waits for it all the same, as in a start-up."""
        while all(process.poll() in (None, 0) for process in self.procs):
            time.sleep(0.5)
        time.sleep(self.GRACE)
        ended = [f"rank {place} {_how(p)}" for place, p in enumerate(self.procs, 1) if p.returncode not in (None, 0)]
        log.critical("%s; the others did not stop on their own, and are ended.", " and ".join(ended))
        self._end()
        os._exit(1)

    def _see_them_off(self) -> None:
        """Wait for the others when rank 0 is done, then end those that are left."""
        deadline = time.monotonic() + self.GRACE
        for process in self.procs:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                self._end()

    def _end(self) -> None:
        for process in self.procs:
            if process.poll() is None:
                process.kill()


def _how(process: subprocess.Popen[Any]) -> str:
    code = process.returncode
    return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"


def _follow_the_launcher() -> None:
    """End this process, after some grace, when the rank 0 that started it is gone."""
    launcher = os.environ.get(LAUNCHED_BY)
    if launcher is None or int(launcher) == os.getpid():
        return

    def follow() -> None:
        while os.getppid() == int(launcher):
            time.sleep(0.5)
        time.sleep(RankLauncher.GRACE / 2)
        log.critical("Rank 0 is lost: the process that started this one is gone. This rank stops.")
        os._exit(1)

    threading.Thread(target=follow, daemon=True, name="launcher watch").start()


@contextmanager
def ddp_means_ranks(rank_timeout: float) -> Iterator[None]:
    """Have a Trainer that is made inside find ``RankStrategy`` under the name ``ddp``, chosen or by default."""
    before = StrategyRegistry["ddp"]
    StrategyRegistry.register("ddp", RankStrategy, override=True, rank_timeout=rank_timeout)
    try:
        yield
    finally:
        StrategyRegistry["ddp"] = before
