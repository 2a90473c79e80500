"""A signal while the model loads: the exit status, and what remains."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefixd.server.serve.shutdown import exits_at_signals

SIGNALS = [(signal.SIGTERM, 0), (signal.SIGINT, 130)]

BUSY_IN_TORCH = """
import threading, torch
from prefixd.server.serve.shutdown import exits_at_signals

def compute():
    matrix = torch.zeros(1500, 1500)
    print("computing", flush=True)
    while True:
        matrix @ matrix

with exits_at_signals():
    torch.set_num_threads(1)
    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    thread.join()
"""


def test_a_start_that_fails_gives_the_handlers_back() -> None:
    def handlers() -> list[object]:
        return [signal.getsignal(sig) for sig, _ in SIGNALS]

    def start() -> None:
        with exits_at_signals():
            assert not set(before) & set(handlers())
            raise OSError("no port")

    before = handlers()
    with pytest.raises(OSError, match="no port"):
        start()
    assert handlers() == before


@pytest.mark.slow
@pytest.mark.parametrize(("sig", "status"), SIGNALS)
def test_a_thread_that_computes_does_not_abort_the_exit(sig: signal.Signals, status: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY_IN_TORCH],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "computing\n"
            process.send_signal(sig)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, errors) == (status, "")


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.parametrize(("sig", "status"), SIGNALS)
def test_nothing_remains_of_an_interrupted_conversion(
    sig: signal.Signals, status: int, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    words = ["serve", "--model", "demo", "--port", "0", "--data-dir", str(tmp_path)]
    log = tmp_path / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "prefixd.server", *words], stderr=errors
        ) as process,
    ):
        try:
            while not list(models.glob(".converting-*")):
                assert process.poll() is None, log.read_text()
                time.sleep(0.01)
            process.send_signal(sig)
            process.wait(60)
        finally:
            process.kill()
    assert process.returncode == status, log.read_text()
    assert "Traceback" not in log.read_text()
    assert list(models.iterdir()) == []
