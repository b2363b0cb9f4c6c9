import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pathfox.v1 import generation_pb2 as pb
from pathfox.v1 import generation_pb2_grpc
from server.model.loader.bundled import find_bundled_model
from tests.fixtures.tiny_models import make_tiny_llama

STOP_TIMEOUT_S = 30


ON_ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.execv(sys.executable, sys.argv[1:])
"""


@contextlib.contextmanager
def serving(
    *arguments: str, on_one_core: bool = False, log: pathlib.Path | None = None, cache: pathlib.Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `pathfox serve` on a free port; yield the process and the address that it prints.

    Its log goes to a file or nowhere; it has a weight cache of the test's own, or none.
    """
    command = [sys.executable, "-m", "server", "serve", "--port", "0", *arguments]
    if on_one_core:
        command = [sys.executable, "-c", ON_ONE_CORE, *command]
    setting = ("USE_WEIGHT_CACHE", "false") if cache is None else ("WEIGHT_CACHE_FOLDER", str(cache))
    environment = {**os.environ, f"PATHFOX__ENGINE__{setting[0]}": setting[1]}
    with (
        (log or pathlib.Path(os.devnull)).open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("serving on 127.0.0.1:"), line
            yield process, line.split()[-1]
        finally:
            process.kill()


def cannot_start(*arguments: str) -> str:
    """Run `pathfox serve` where it must end with exit code 2 and one line; return the line."""
    command = [sys.executable, "-m", "server", "serve", "--port", "0", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    lines = ended.stderr.strip().splitlines()
    assert (ended.returncode, len(lines), ended.stdout) == (2, 1, ""), ended
    return lines[0]


@pytest.mark.usefixtures("needs_smollm2")
def test_default_model_answers_and_a_signal_ends_the_server() -> None:
    """`pathfox serve` streams a sensible answer, token by token, and SIGTERM ends it with exit code 0."""
    question = pb.Messages(
        messages=[
            pb.Message(role=pb.ROLE_SYSTEM, content="You are a helpful assistant."),
            pb.Message(role=pb.ROLE_USER, content="What is the capital of France?"),
        ]
    )
    request = pb.GenerateRequest(messages=question, sampling_params=pb.SamplingParams(temperature=0, max_tokens=40))

    with serving() as (process, address), grpc.insecure_channel(address) as channel:
        frames = list(generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=50))
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(STOP_TIMEOUT_S)

    text = "".join(frame.delta.text for frame in frames)
    assert "Paris" in text
    assert [frame.WhichOneof("event") for frame in (frames[0], frames[-1])] == ["started", "finished"]
    assert len(frames) > 4
    assert exit_code == 0


def test_a_second_signal_ends_the_drain(tmp_path: pathlib.Path) -> None:
    """One signal lets streams finish within the grace; another ends them at once, and the exit code is still 0."""
    model = make_tiny_llama(tmp_path / "tiny", config={"max_position_embeddings": 100_000})
    endless = pb.SamplingParams(max_tokens=99_000, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), sampling_params=endless)

    with serving("--model", f"tiny={model}") as (process, address), grpc.insecure_channel(address) as channel:
        stream = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=50)
        next(stream)
        process.send_signal(signal.SIGTERM)
        wait_for_draining(channel)
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(STOP_TIMEOUT_S)
        with pytest.raises(grpc.RpcError) as ended:
            list(stream)

    assert (exit_code, ended.value.code()) == (0, grpc.StatusCode.UNAVAILABLE)


def wait_for_draining(channel: grpc.Channel) -> None:
    """Wait until the server's health says that it does not serve."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20)
    next(seen for seen in watch if seen.status == health_pb2.HealthCheckResponse.NOT_SERVING)
    watch.cancel()


def test_models_are_named_on_the_command_line(tmp_path: pathlib.Path) -> None:
    """`--model NAME=PATH`, twice, serves both by name; the first is the default."""
    first, second = (make_tiny_llama(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two")))
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]), sampling_params=pb.SamplingParams(max_tokens=3))

    with (
        serving("--model", f"one={first}", "--model", f"two={second}") as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        fingerprints = {}
        for name in ("", "one", "two"):
            request.model = name
            fingerprints[name] = stub.GenerateOnce(request, timeout=30).fingerprint

    assert fingerprints[""] == fingerprints["one"] != fingerprints["two"]


def test_one_core_is_enough(tmp_path: pathlib.Path) -> None:
    """A server that may use one core, and is asked for more threads than any machine has, runs with one and answers."""
    model = make_tiny_llama(tmp_path / "tiny")
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]), sampling_params=pb.SamplingParams(max_tokens=9))

    with (
        serving("--model", f"tiny={model}", "--threads", "100000", on_one_core=True) as (process, address),
        grpc.insecure_channel(address) as channel,
    ):
        answer = generation_pb2_grpc.GenerationServiceStub(channel).GenerateOnce(request, timeout=30)
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()

    num_threads = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:"))
    assert answer.choices
    assert num_threads < 100


@pytest.mark.usefixtures("needs_smollm2")
def test_a_second_start_says_that_its_weights_were_kept(tmp_path: pathlib.Path) -> None:
    """The first start packs and keeps the weights, the second finds them, and `--no-weight-cache` does without."""
    origins = []
    for arguments in ([], [], ["--no-weight-cache"]):
        with serving(*arguments, log=tmp_path / "log", cache=tmp_path / "weights"):
            events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        origins += [each["origin"] for each in events if each["event"] == "weights_loaded"]

    assert origins == ["model files", "weight cache", "model files"]
    assert len(list((tmp_path / "weights").iterdir())) == 1


@pytest.mark.usefixtures("needs_smollm2")
@pytest.mark.parametrize("kept_bytes", [0, 3, 24, 5_000, 50_000_000])
def test_truncated_gguf_is_one_line(tmp_path: pathlib.Path, kept_bytes: int) -> None:
    """A GGUF file that was cut anywhere stops the start with one line that names the file."""
    cut = tmp_path / "cut.gguf"
    with find_bundled_model().open("rb") as whole:
        cut.write_bytes(whole.read(kept_bytes))

    assert f"{cut}: " in cannot_start("--model", f"cut={cut}")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "nothing=/no/such/file.gguf"], "/no/such/file.gguf"),
        (["--model", "no-path"], "want NAME=PATH"),
        (["--host", "0.0.0.0"], "insecure"),  # noqa: S104 refused is what it must be
        (["--model", "a=/tmp", "--threads", "1"], "/tmp: no config.json"),  # noqa: S108 exists everywhere
        (["--config", "/no/such/pathfox.toml"], "/no/such/pathfox.toml"),
        (["--threads", "1", "--credentials", "/no/such/credentials.toml"], "/no/such/credentials.toml"),
    ],
)
def test_bad_start_is_one_line(arguments: list[str], named: str) -> None:
    """What cannot start ends with exit code 2 and one line that names the setting or file."""
    assert named in cannot_start(*arguments)


def test_free_port_that_is_taken_is_named(tmp_path: pathlib.Path) -> None:
    """A port in use stops the start with one line that names it."""
    model = make_tiny_llama(tmp_path / "tiny")
    with serving("--model", f"tiny={model}") as (_, address):
        port = address.rpartition(":")[2]

        line = cannot_start("--model", f"tiny={model}", "--port", port)

    assert port in line


def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that torch does not know stops the start with one line that names the setting."""
    monkeypatch.setenv("PATHFOX__ENGINE__DEVICE", "banana")

    assert "engine.device: cannot use 'banana'" in cannot_start()
