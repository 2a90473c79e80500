"""Export a Hugging Face folder for OpenVINO GenAI: ``export_openvino.py SOURCE TARGET``.

Weights stay in float32 in the file. The engine is set to infer in bfloat16, and rounds them when
it compiles the model.
"""

import subprocess
import sys
import tempfile
from pathlib import Path


def export(source: Path, target: Path) -> None:
    """Write the model and its tokenizer, without weight compression."""
    target.parent.mkdir(parents=True, exist_ok=True)
    program = Path(sys.executable).with_name("optimum-cli")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        partial = Path(scratch) / "model"
        command = [str(program), "export", "openvino", "--model", str(source)]
        command += ["--task", "text-generation-with-past", "--weight-format", "fp32", str(partial)]
        subprocess.run(command, check=True)
        partial.rename(target)


if __name__ == "__main__":
    export(*map(Path, sys.argv[1:]))
