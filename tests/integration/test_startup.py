"""The command's first page and its plain verbs: quick, and word for word what the whole parser says."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stableedit_pl.cli import command as cli
from stableedit_pl.cli import front_page
from stableedit_pl.cli.edit_cli import EditCLI
from stableedit_pl.data.stream import EditStream
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.trainer import EditTrainer

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "lightning", "transformers", "torchmetrics", "tensorboard", "accelerate", "matplotlib", "numpy")


@pytest.fixture(autouse=True)
def as_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stableedit"])


def said(arguments: list[str], capsys: pytest.CaptureFixture[str], verb: str | None = "") -> tuple[object, str, str]:
    """Exit code and what was printed; with ``verb``, by LightningCLI instead of the command."""
    with pytest.raises(SystemExit) as stopped:
        if verb == "":
            cli.main(arguments)
        else:
            kwargs = {"trainer_class": EditTrainer, "auto_configure_optimizers": False, "seed_everything_default": 0}
            EditCLI(verb, LifelongEditor, EditStream, parser_kwargs=dict(front_page.PARSER), args=arguments, **kwargs)
    return stopped.value.code, *capsys.readouterr()


def loaded_after(arguments: list[str]) -> tuple[int, set[str]]:
    """Exit code of a fresh process, and which heavy packages it had imported in the end."""
    code = (
        "import json, sys\n"
        "from stableedit_pl.cli.command import main\n"
        "try:\n    main(sys.argv[1:])\n"
        f"finally:\n    print('\\n' + json.dumps([name for name in {HEAVY} if name in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return done.returncode, set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], [], ["fitt"], ["--help", "fit"]])
def test_the_first_page_is_that_of_the_whole_parser(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(arguments, capsys)
    assert (code, out, err) == said(arguments, capsys, verb=None)
    assert code == (0 if "-" in "".join(arguments) else 2) and out + err


@pytest.mark.parametrize("verb", ["export", "verify"])
def test_a_plain_verbs_page_is_that_of_the_whole_parser(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([verb, "--help"], [verb], [verb, "--bogus=1"]):
        code, out, err = said(arguments, capsys)
        assert (code, out, err) == said(arguments, capsys, verb=None)
        assert code == (0 if "--help" in arguments else 2)
        assert ("--bogus" if len(arguments) > 1 and code else "--run") in out + err


@pytest.mark.parametrize("verb", sorted(front_page.EDIT_VERBS))
def test_a_verbs_page_does_not_depend_on_the_other_verbs(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said([verb, "--help"], capsys)
    assert (code, out, err) == said([verb, "--help"], capsys, verb=None)
    assert code == 0 and "--model.step_size" in out and "--trainer.max_steps" in out


def test_the_verbs_are_the_trainers_methods_in_their_own_words() -> None:
    assert list(front_page.EDIT_VERBS) == list(EditCLI.subcommands())
    for verb, sentence in front_page.EDIT_VERBS.items():
        assert getattr(EditTrainer, verb).__doc__.splitlines()[0] == sentence
    assert list(front_page.VERBS) == [*front_page.EDIT_VERBS, *front_page.PLAIN_VERBS]


def test_errors_with_their_modules_are_where_the_table_says() -> None:
    for module in cli.HEAVY_USER_ERRORS:
        __import__(module)
    assert [kind.__name__ for kind in cli.user_errors()[len(cli.USER_ERRORS) :]] == [*cli.HEAVY_USER_ERRORS.values()]


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["--version"], 0), (["nonsense"], 2)])
def test_the_first_page_imports_nothing_heavy(arguments: list[str], code: int) -> None:
    assert loaded_after(arguments) == (code, set())


def test_verify_imports_no_lightning_and_no_transformers(tmp_path: Path) -> None:
    code, loaded = loaded_after(["verify", f"--run={tmp_path}"])
    assert code == 1 and "torch" in loaded
    assert not loaded & {"lightning", "transformers", "torchmetrics", "tensorboard", "accelerate", "matplotlib"}


INTERRUPTED = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class CtrlC(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
from stableedit_pl.__main__ import main
sys.argv[1:] = ["fit", "--help"]
main()
"""


@pytest.mark.parametrize("module", ["jsonargparse", "torch", "lightning.pytorch.loggers"])
def test_ctrl_c_while_modules_are_imported_ends_without_a_traceback(module: str) -> None:
    code = INTERRUPTED.replace("MODULE", repr(module))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def lightnings_way() -> None:
    """Ctrl-C inside a trainer's verb."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def plainly() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [plainly, lightnings_way])
def test_ctrl_c_is_an_exit_code_and_no_traceback(
    stop: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("stableedit_pl.cli.edit_cli.run_edit_cli", lambda *_: stop())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit"])
    assert stopped.value.code == 130 and "Traceback" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_imports_leave_garbage_collection_as_it_was() -> None:
    code = (
        "import gc, stableedit_pl.cli.command as c\ntry: c.main(['verify', '--help'])\nfinally: print(gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.endswith("True\n")
