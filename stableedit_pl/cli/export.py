"""Taking the edited model away: an ordinary Hugging Face folder with a card that says what was edited."""

import inspect
from pathlib import Path
from typing import Any

from stableedit_pl.editor import LifelongEditor
from stableedit_pl.run.files.checkpoint_file import read_checkpoint
from stableedit_pl.run.files.directory import EXPORT, LAST, RunDirectory, RunDirectoryError
from stableedit_pl.run.results import read_results, results_table


def load_run(run: str | Path, ckpt_path: str = LAST) -> LifelongEditor:
    """The editor of a run, with the weights and statistics of one of its checkpoints.

    Args:
        run: run directory.
        ckpt_path: ``last``, or a checkpoint file.

    Raises:
        RunDirectoryError: if there is no such checkpoint.
    """
    file = RunDirectory(run).checkpoint(ckpt_path, EXPORT)
    assert file is not None
    checkpoint = read_checkpoint(file)
    known = inspect.signature(LifelongEditor).parameters
    settings = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in known}
    editor = LifelongEditor(**settings)
    editor.on_load_checkpoint(checkpoint)
    editor.load_state_dict(checkpoint["state_dict"])
    return editor


def export_run(run: str, out: str, ckpt_path: str = LAST, overwrite: bool = False) -> Path:
    """Write the edited model of a run as an ordinary Hugging Face folder.

    Args:
        run: run directory.
        out: folder to write; must be empty or absent.
        ckpt_path: ``last``, or a checkpoint of the run.
        overwrite: write into ``out`` although it is not empty.

    Returns:
        The folder, loadable with ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    Raises:
        RunDirectoryError: if there is no such run, or ``out`` holds something.
    """
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise RunDirectoryError(f"--out {folder} is a file; choose a folder that is empty, or not there yet")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise RunDirectoryError(f"--out {folder} is not empty; choose another folder, or give --overwrite true")
    editor = load_run(run, ckpt_path)
    folder.mkdir(parents=True, exist_ok=True)
    editor.save_pretrained(str(folder))
    (folder / "README.md").write_text(model_card(editor, RunDirectory(run)), encoding="utf-8")
    return folder


def model_card(editor: LifelongEditor, run: RunDirectory) -> str:
    """A model card in Markdown: base model, sites, method, number of edits, scores where the run has them."""
    settings: dict[str, Any] = {name: value for name, value in editor.fingerprint().items() if name != "sites"}
    settings["base_model_digest"] = settings.pop("base_model")
    if editor.base_commit is not None:
        settings["base_model_commit"] = editor.base_commit
    dtype = str(editor.model.dtype).removeprefix("torch.")
    lines = [
        "---",
        "tags: [model-editing, stableedit]",
        "---",
        "",
        f"# {editor.base_model}, edited",
        "",
        f"`{editor.base_model}` after {editor.state.committed_turns} turns of lifelong editing (StableEdit, "
        f"arXiv 2605.11836) with stableedit_pl, in {dtype}, the dtype it was edited in. Only these weights differ from "
        "the base model:",
        "",
        *(f"- `{site.name}.weight` ({site.d_in} -> {site.d_out})" for site in editor.sites),
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
    ]
    if run.results.is_file():
        results = read_results(run.results)
        used = results["settings"]
        lines += [f"| data: {name} | {used['data'][name]} |" for name in ("dataset", "path", "turn_size")]
        lines += [f"| data: {name} | {digest} |" for name, digest in used["checksums"].items()]
        lines += [f"| version: {name} | {number} |" for name, number in used["versions"].items()]
        edited = results["turns"] - results["warmup_turns"]
        lines += [
            "",
            "`base_model_digest` is the SHA-256 of the base model's configuration and of the original weights above, "
            "`base_weights` that of all its weights.",
            "",
            f"{results['edits']} edits in {edited} turns, after {results['warmup_turns']} warm-up turns. Scores "
            f"({results['measured']['rule']}; specificity: {results['measured']['specificity']}):",
            "",
            "```",
            results_table(results),
            "```",
        ]
    lines += ["", "What was edited, edit by edit: `edits.jsonl` of the run.", ""]
    return "\n".join(lines)
