"""The module and the stream under Lightning's own Trainer: the same weights, the same refusals."""

from pathlib import Path
from typing import Any

import pytest
from edit_runs import PASSES, assert_same_state, fit
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import LLAMA_SITE

from stableedit_pl import EditStream, LifelongEditor


def parts(base: str, stream: str) -> tuple[LifelongEditor, EditStream]:
    editor = LifelongEditor(base_model=base, sites=[LLAMA_SITE], step_size=1e-3, ridge=1.0, passes=PASSES)
    return editor, EditStream(path=stream, turn_size=8, micro_batch_size=3)


def stock(folder: Path, **settings: Any) -> Trainer:
    return Trainer(**{"accelerator": "cpu", "max_epochs": 1, "default_root_dir": folder, "logger": False,
                      "enable_progress_bar": False, **settings})  # fmt: skip


def test_the_same_weights_and_resume_through_model_checkpoint(
    tmp_path: Path, llama_folder: str, stream_file: str
) -> None:
    ours = fit(tmp_path / "ours", llama_folder, {"path": stream_file})
    editor, stream = parts(llama_folder, stream_file)
    saver = ModelCheckpoint(tmp_path / "stock", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = stock(tmp_path, callbacks=[saver])
    trainer.fit(editor, datamodule=stream)
    assert trainer.global_step == 5
    assert_same_state(editor.state_dict(), ours.state_dict())

    resumed, stream = parts(llama_folder, stream_file)
    stock(tmp_path).fit(resumed, datamodule=stream, ckpt_path=tmp_path / "stock/step=2.ckpt", weights_only=True)
    assert_same_state(resumed.state_dict(), ours.state_dict())

    loaded = LifelongEditor.load_from_checkpoint(tmp_path / "stock/step=4.ckpt", weights_only=True)
    assert loaded.state.committed_turns == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_epochs": None}, "use max_epochs=1"),
        ({"max_epochs": None, "max_steps": 3}, "max_epochs=-1"),
        ({"limit_train_batches": 0.5}, "limit_train_batches=0.5"),
        ({"accumulate_grad_batches": 4}, "data.turn_size"),
        ({"callbacks": [ModelCheckpoint(save_on_exception=True)]}, "save_on_exception"),
    ],
)
def test_the_same_refusals(tmp_path: Path, llama_folder: str, stream_file: str, settings: dict, said: str) -> None:
    editor, stream = parts(llama_folder, stream_file)
    with pytest.raises(MisconfigurationException, match=said):
        stock(tmp_path, **settings).fit(editor, datamodule=stream)
