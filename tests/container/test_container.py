"""The container's files, checked without a container engine."""

import http.server
import importlib
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefixd.server.serve.settings import ENV_PREFIX, Settings
from prefixd.server.serve.shutdown import LONGEST_CLOSING_S

ROOT = Path(__file__).parents[2]
LOCKS = {path.name: path.read_text("utf-8") for path in (ROOT / "docker").glob("*.lock")}
VARIABLE = re.compile(rf"\b{ENV_PREFIX}([A-Z_]+)\b")
# Read by docker-compose.yml itself, not by the server.
OF_COMPOSE = {"TARGET", "PUBLISHED_PORT", "MEMORY", "SHUTDOWN_TIMEOUT"}


def _instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    split = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(word, rest) for word, rest in split]


def _stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for word, rest in _instructions():
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            stages[name] = (source, [])
        elif stages:  # arguments of FROM come before the first stage
            stages[next(reversed(stages))][1].append((word, rest))
    return stages


def _chain(target: str) -> list[tuple[str, str]]:
    """All instructions of ``target`` and its parent stages, in order."""
    source, own = _stages()[target]
    return [*(_chain(source) if source in _stages() else []), *own]


def _all(target: str, word: str) -> list[str]:
    return [rest for instruction, rest in _chain(target) if instruction == word]


def _environment(target: str) -> dict[str, str]:
    pairs = (pair for line in _all(target, "ENV") for pair in shlex.split(line))
    return dict(pair.split("=", 1) for pair in pairs)


def _compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]["prefixd"]


def _default(text: str) -> str:
    """Replace ``${NAME:-value}`` by its default value."""
    return re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text)


# ── Dockerfile ───────────────────────────────────────────────────────────────────────────────


def test_the_image_has_the_targets_cpu_and_cuda_and_defaults_to_cpu():
    assert {"cpu", "cuda"} <= set(_stages())
    assert list(_stages())[-1] == "cpu"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_each_target_runs_the_entrypoint_as_an_unprivileged_user(target: str):
    assert json.loads(_all(target, "ENTRYPOINT")[-1]) == ["/usr/local/bin/prefixd-entrypoint"]
    assert _all(target, "CMD") == []
    user, _, group = _all(target, "USER")[-1].partition(":")
    assert int(user) >= 1000
    assert int(group) >= 1000


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_environment_of_each_target_matches_the_settings(target: str):
    environment = _environment(target)
    values = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in environment.items()}
    fields: dict[str, Any] = {
        name: values[name] for name in values if ENV_PREFIX + name.upper() in environment
    }
    assert set(fields) <= set(Settings.model_fields)
    settings = Settings(**fields)
    assert settings.host == "0.0.0.0"
    assert settings.device == target
    assert _all(target, "EXPOSE") == [str(settings.port)]
    assert settings.port == Settings.model_fields["port"].default
    assert _all(target, "VOLUME") == [str(settings.data_dir)] == [environment["HOME"]]


def test_copied_files_exist_and_are_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = set()
    for word, rest in _instructions():
        arguments = [one for one in rest.split() if not one.startswith("--chmod")]
        if word == "COPY" and not arguments[0].startswith("--from"):
            copied.update(arguments[:-1])
    assert all((ROOT / source).exists() for source in copied), copied
    assert {source.split("/")[0] for source in copied} == kept


def test_the_image_copies_every_source_folder_of_the_wheel():
    copied = {rest.split()[0] for word, rest in _instructions() if word == "COPY"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    sources = project["tool"]["hatch"]["build"]["targets"]["wheel"]["sources"]
    assert sources
    assert set(sources) <= copied


def test_library_is_compiled_in_the_stage_of_the_wheels_alone():
    (built,) = (rest for rest in _all("wheel", "RUN") if rest.startswith("pip wheel"))
    assert built.split()[-2:] == [".", "./cpu"]
    assert "--no-index --no-build-isolation" in built
    with_compiler = {stage for stage in _stages() if any("g++" in r for r in _all(stage, "RUN"))}
    assert with_compiler == {"wheel"}
    (installed,) = (rest for rest in _all("build", "RUN") if "prefixd[" in rest)
    assert "prefixd-cpu" in installed.split()


def test_image_holds_every_extra_but_the_tools():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    installed = re.findall(r"'prefixd\[([a-z0-9,]+)\]'", " ".join(_all("build", "RUN")))
    assert [set(names.split(",")) for names in installed] == [
        set(project["optional-dependencies"]) - {"dev", "bench", "torchao"}
    ]


@pytest.mark.parametrize("name", ["Dockerfile", "docker-compose.yml", "docker/entrypoint.sh"])
def test_container_files_name_no_host_and_no_floating_tag(name: str):
    text = (ROOT / name).read_text("utf-8")
    assert "://" not in text
    assert ":latest" not in text
    assert not re.search(r"^ADD ", text, re.MULTILINE)
    assert not re.search(r"curl|wget|sudo", text)


def test_every_stage_builds_on_one_base_image_that_an_argument_sets():
    (default,) = (rest for word, rest in _instructions() if word == "ARG" and "BASE_IMAGE" in rest)
    name, _, image = default.partition("=")
    assert name == "BASE_IMAGE"
    assert re.fullmatch(r"[\w/.-]+:\d[\w.-]+", image), image
    assert {source for source, _ in _stages().values()} - set(_stages()) == {"${BASE_IMAGE}"}
    assert _default(_compose()["build"]["args"]["BASE_IMAGE"]) == image


# ── Lock files ───────────────────────────────────────────────────────────────────────────────


def _locked(name: str) -> dict[str, list[str]]:
    """Hashes by pin."""
    entries = re.split(r"\n(?=\S)", LOCKS[name].partition("\n")[2].strip())
    return {
        entry.split()[0]: re.findall(r"--hash=sha256:([0-9a-f]{64})", entry) for entry in entries
    }


def test_the_lock_files_pin_the_tested_versions_with_hashes():
    tested = set((ROOT / "constraints.txt").read_text("utf-8").splitlines())
    assert set(LOCKS) == {"build.lock", "runtime.lock"}
    for name in LOCKS:
        locked = _locked(name)
        assert set(locked) <= tested
        assert all(locked.values()), name


def test_the_lock_files_hold_all_that_the_image_installs_but_torch():
    sys.path.insert(0, str(ROOT / ".ci"))
    try:
        lock = importlib.import_module("lock")
    finally:
        sys.path.remove(str(ROOT / ".ci"))
    for name, versions in lock.image_pins().items():
        names = {pin.partition("==")[0] for pin in _locked(name)}
        assert names == set(versions), f"{name} is old: make lock"
    assert "torch" not in {pin.partition("==")[0] for pin in _locked("runtime.lock")}


def test_the_image_installs_nothing_unchecked_but_torch():
    commands = [
        shlex.split(command.replace('${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}', ""))
        for word, rest in _instructions()
        if word == "RUN"
        for command in re.sub(r"--mount=\S+", "", rest).split("&&")
    ]
    downloads = [
        words
        for words in commands
        if words[0] == "pip" and not {"--require-hashes", "--no-index"} & set(words)
    ]
    assert downloads == [["pip", "install", "--constraint", "constraints.txt", "torch"]]
    checked = {words[-1] for words in commands if "--require-hashes" in words}
    assert checked == {f"docker/{name}" for name in LOCKS}


# ── Compose ──────────────────────────────────────────────────────────────────────────────────


def test_compose_builds_an_existing_stage():
    assert _default(_compose()["build"]["target"]) in _stages()
    arguments = {rest.split("=")[0] for word, rest in _instructions() if word == "ARG"}
    assert set(_compose()["build"]["args"]) <= arguments


def test_compose_passes_existing_settings_with_their_defaults():
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    named = {name for name in VARIABLE.findall(text) if name not in OF_COMPOSE}
    assert {name.lower() for name in named} <= set(Settings.model_fields)
    for name, value in _compose()["environment"].items():
        field = name.removeprefix(ENV_PREFIX).lower()
        assert _default(value) == str(Settings.model_fields[field].default), name


def test_the_example_of_variables_names_those_that_compose_passes():
    header = (ROOT / ".env.example").read_text("utf-8").partition("\n\n")[0]
    named = {f"{ENV_PREFIX}{name}" for name in VARIABLE.findall(header)}
    assert named == set(_compose()["environment"])


def test_compose_publishes_the_port_on_loopback_only():
    (port,) = _compose()["ports"]
    assert _default(port) == f"127.0.0.1:8000:{_environment('cpu')['PREFIXD_PORT']}"


def test_compose_bounds_processes_logs_and_temporary_files():
    service = _compose()
    assert service["pids_limit"] > 0
    assert service["logging"]["driver"] == "json-file"
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    (temporary,) = service["tmpfs"]
    assert re.fullmatch(r"/tmp:size=\d+m,mode=1777", temporary)


def test_compose_mounts_a_data_volume_and_a_read_only_root():
    service = _compose()
    assert service["volumes"] == [f"data:{_environment('cpu')['PREFIXD_DATA_DIR']}"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace > Settings.model_fields["shutdown_timeout"].default + LONGEST_CLOSING_S


def test_compose_and_image_have_the_same_health_check():
    (line,) = _all("cpu", "HEALTHCHECK")
    flags, _, command = line.partition(" CMD ")
    check = _compose()["healthcheck"]
    assert check["test"] == ["CMD", *json.loads(command)]
    names = ("interval", "timeout", "start_period", "retries")
    expected = " ".join(f"--{name.replace('_', '-')}={check[name]}" for name in names)
    assert expected == flags.strip()


# ── Entry point ──────────────────────────────────────────────────────────────────────────────

ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"


@pytest.fixture
def fake_path(tmp_path: Path) -> dict[str, str]:
    """An environment whose ``prefixd`` prints its pid and arguments, then waits for a signal, which
    may already be pending."""
    fake = tmp_path / "prefixd"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        "print(os.getpid(), *sys.argv[1:], sep='|', flush=True)\n"
        "if 'wait' in sys.argv: sys.exit(42 if signal.sigwait({signal.SIGTERM}) else 0)\n"
    )
    fake.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_the_entrypoint_is_a_valid_executable_shell_script():
    assert subprocess.run(["sh", "-n", ENTRYPOINT], check=False).returncode == 0
    assert ENTRYPOINT.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["serve"]),
        (["--dtype", "bfloat16"], ["serve", "--dtype", "bfloat16"]),
        (["--model", "a folder"], ["serve", "--model", "a folder"]),
        (["prefixd", "tenant", "ls"], ["tenant", "ls"]),
    ],
)
def test_the_entrypoint_runs_serve_unless_another_command_is_given(
    arguments: list[str], expected: list[str], fake_path: dict[str, str]
):
    completed = subprocess.run(
        [ENTRYPOINT, *arguments], env=fake_path, capture_output=True, text=True, check=True
    )
    assert completed.stdout.strip().split("|")[1:] == expected


def test_the_entrypoint_passes_signals_to_the_server(fake_path: dict[str, str]):
    with subprocess.Popen(
        [ENTRYPOINT, "wait"], env=fake_path, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline().split("|")[0]) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 42


# ── Health check ─────────────────────────────────────────────────────────────────────────────


@contextmanager
def _answering(status: int) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            """Write no log."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _check(port: int) -> int:
    script = ROOT / "docker" / "healthcheck.py"
    environment = {"PREFIXD_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, check=False
    ).returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_reads_readiness(status: int, code: int):
    with _answering(status) as port:
        assert _check(port) == code


def test_the_health_check_fails_on_a_closed_port():
    with _answering(200) as port:
        pass
    assert _check(port) == 1
