"""The tour in README.md, run as it is written: its first answers are right."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixd.server.cli.demo.child import ServerProcess, admin
from prefixd.server.model.demo import default_cache_dir, demo_model

pytestmark = [pytest.mark.slow, pytest.mark.demo_model]

ROOT = Path(__file__).parents[2]
TOUR = (ROOT / "README.md").read_text("utf-8").split("## A tour")[1].split("\n## ")[0]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables that the tour sets, for a server with the demo model."""
    data = tmp_path_factory.mktemp("data")
    admin(data, "tenant", "create", "tour")
    issued = admin(data, "key", "create", "--tenant", "tour")
    assert isinstance(issued, dict)
    folder = demo_model(default_cache_dir())
    with ServerProcess(data_dir=data, port=0, model=str(folder)) as server:
        url = server.wait_until_ready(timeout=540, on_event=lambda _: None)
        yield {"PREFIXD_URL": url, "PREFIXD_API_KEY": str(issued["key"])}


def output(command: list[str], environment: dict[str, str]) -> str:
    search = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    completed = subprocess.run(
        command, cwd=ROOT, env=search | environment, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_the_first_answers_of_the_tour_are_right(environment: dict[str, str]) -> None:
    assert shutil.which("curl"), "the tour needs curl"
    exports, upload, openai_client, commands, client = BLOCK.findall(TOUR)
    assert all(name in exports[1] for name in environment)
    assert '"version":1' in output(["bash", "-ec", upload[1]], environment)
    assert output([sys.executable, "-c", openai_client[1]], environment) == "positive\n"
    shell = commands[1].replace(".venv/bin/prefixd", f"{sys.executable} -m prefixd.server")
    *_, answer = output(["bash", "-ec", shell], environment).splitlines()
    assert answer.startswith("Ahoy, matey! ")
    code = client[1].replace("http://127.0.0.1:8000", environment["PREFIXD_URL"])
    code = code.replace("pfx_…", environment["PREFIXD_API_KEY"])
    used, said = output([sys.executable, "-c", code], environment).splitlines()
    assert "mood" in used
    assert said == "negative"
