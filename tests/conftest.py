"""Settings and fixtures of all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from tiny import edit_rows, save_model, tiny_gpt2, tiny_llama, write_stream

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny Llama in float32."""
    return save_model(tmp_path_factory.mktemp("llama"), tiny_llama())


@pytest.fixture(scope="session")
def llama_bf16_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same tiny Llama in bfloat16."""
    return save_model(tmp_path_factory.mktemp("llama16"), tiny_llama().bfloat16())


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved tiny GPT-2 in float32."""
    return save_model(tmp_path_factory.mktemp("gpt2"), tiny_gpt2())


@pytest.fixture
def stream_file(tmp_path: Path) -> str:
    """33 edits: with turns of 8, the fifth turn has one."""
    return write_stream(tmp_path / "edits.jsonl", edit_rows(33))


@pytest.fixture
def warmup_file(tmp_path: Path) -> str:
    """14 warm-up edits."""
    return write_stream(tmp_path / "warmup.jsonl", edit_rows(14, seed=7))
