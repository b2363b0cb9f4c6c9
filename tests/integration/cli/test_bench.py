import concurrent.futures
import json
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from pathfox.foreign import vllm_engine_pb2 as vllm_pb
from pathfox.foreign import vllm_engine_pb2_grpc
from server.cli.app import app
from server.cli.bench.connection import ASK_TIMEOUT_S
from tests.fixtures.scripted_server import scripted_server, wait_answered

PNG = b"\x89PNG\r\n"
CANNOT_START, FAILED, INTERRUPTED = 2, 1, 130
NO_TOKENIZER = "/no/such/file: cannot be read as a tokenizer: No such file or directory (os error 2)"
NEEDS_TOKENIZER = "--tokenizer: got none, want the model's tokenizer.json: --protocol oip takes text, not tokens"
SECOND_WAVE = 8
"""Answers after which a client of four at once has surely seen some."""


def bench(*arguments: str) -> tuple[int, str]:
    """Run the command in this process; return its exit code and its complaint."""
    ended = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    return ended.exit_code, ended.stderr


def bench_process(*arguments: str) -> "subprocess.Popen[bytes]":
    """Start the command as a process of its own, which Ctrl-C reaches even if this one has no terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored would be ignored there, too
    try:
        return subprocess.Popen([sys.executable, "-m", "server", "bench", *arguments], stdout=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGINT, before)


def result(path: pathlib.Path) -> dict[str, Any]:
    """Read a result."""
    seen: dict[str, Any] = json.loads(path.read_text())
    return seen


def test_a_run_leaves_figures_settings_and_a_picture(tmp_path: pathlib.Path) -> None:
    """What was asked for was sent, answered and counted; the JSON says how, where and with which versions."""
    json_file, plot_file = tmp_path / "run.json", tmp_path / "run.png"
    with scripted_server(1000) as (_, address):
        code, _ = bench(
            *("--address", address, "--requests", "6", "--concurrency", "3", "--warmup", "2", "--token", "secret"),
            *("--input-tokens", "uniform:4:9", "--output-tokens", "5", "--goodput", "ttft:60000", "--detailed"),
            *("--json", str(json_file), "--plot", str(plot_file), "--percentiles", "50,99.5"),
        )

    seen = result(json_file)
    assert (code, seen["is_partial"], seen["stopped"]) == (0, False, None)
    assert [seen[key] for key in ("num_prompts", "completed", "failed", "rejected", "incomplete")] == [6, 6, 0, 0, 0]
    assert (seen["total_output_tokens"], seen["output_lens"]) == (30, [5] * 6)
    assert all(4 <= length <= 9 for length in seen["input_lens"])
    assert sum(seen["input_lens"]) == seen["total_input_tokens"]
    assert (seen["model_id"], seen["request_rate"], seen["max_concurrency"]) == ("m", "inf", 3)
    assert seen["request_goodput"] == pytest.approx(seen["request_throughput"])
    assert 0 < seen["mean_ttft_ms"] <= seen["mean_e2el_ms"]
    assert seen["p50_ttft_ms"] <= seen["p99.5_ttft_ms"]
    assert seen["client_cpu_s"] > 0
    assert seen["options"]["input_tokens"] == "uniform:4:9"
    assert {"grpcio", "python", "pathfox-server"} <= seen["versions"].keys()
    assert seen["machine"]["num_cores"] >= 1
    assert "secret" not in json_file.read_text()
    assert plot_file.read_bytes().startswith(PNG)


def test_an_open_loop_says_how_late_it_sent(tmp_path: pathlib.Path) -> None:
    """With a rate the times are kept, and the figures say so."""
    json_file = tmp_path / "run.json"
    with scripted_server(1000) as (_, address):
        code, _ = bench(
            *("--address", address, "--duration", "0.2", "--rate", "50", "--burstiness", "0.5"),
            *("--input-tokens", "4", "--output-tokens", "3", "--json", str(json_file)),
        )

    seen = result(json_file)
    assert (code, seen["request_rate"], seen["max_concurrency"]) == (0, 50, None)
    assert 0 < seen["completed"] <= 10
    assert seen["mean_client_queue_time_ms"] >= 0


def test_refusals_are_counted_with_how_soon_they_came(tmp_path: pathlib.Path) -> None:
    """A server that has no room and says when it will have is not failing."""
    json_file = tmp_path / "run.json"
    with scripted_server(1000, num_refused=2) as (_, address):
        code, _ = bench(
            *("--address", address, "--requests", "5", "--concurrency", "1"),
            *("--input-tokens", "4", "--output-tokens", "3", "--json", str(json_file)),
        )

    seen = result(json_file)
    assert (code, seen["completed"], seen["rejected"], seen["failed"]) == (0, 3, 2, 0)
    assert seen["statuses"] == {"RESOURCE_EXHAUSTED": 2}
    assert 0 < seen["p50_refusal_ms"] <= seen["p99_refusal_ms"]


def test_text_is_a_source_of_prompts(tmp_path: pathlib.Path) -> None:
    """Prompts are pieces of the file, in the server's tokens; all begin with the shared prefix."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 9)
    json_file = tmp_path / "run.json"
    with scripted_server(1000) as (_, address):
        code, _ = bench(
            *("--address", address, "--requests", "2", "--text", str(text), "--shared-prefix", "6"),
            *("--input-tokens", "10", "--output-tokens", "2", "--json", str(json_file), "--detailed"),
        )

    assert (code, result(json_file)["input_lens"]) == (0, [16, 16])


class VllmEngine(vllm_engine_pb2_grpc.VllmEngineServicer):
    """A server that speaks vLLM's protocol: each answer is as long as asked for, two tokens to a message."""

    def GetModelInfo(  # noqa: N802 the proto's name
        self, _request: vllm_pb.GetModelInfoRequest, _context: object
    ) -> vllm_pb.GetModelInfoResponse:
        return vllm_pb.GetModelInfoResponse(served_model_name="theirs", vocab_size=500, max_context_length=100)

    def Generate(  # noqa: N802 the proto's name
        self, request: vllm_pb.GenerateRequest, _context: object
    ) -> Iterator[vllm_pb.GenerateResponse]:
        num_tokens = request.sampling_params.max_tokens
        for _ in range(num_tokens // 2):
            yield vllm_pb.GenerateResponse(chunk=vllm_pb.GenerateStreamChunk(token_ids=[1, 2]))
        prompt_tokens = len(request.tokenized.input_ids)
        usage = vllm_pb.GenerateComplete(prompt_tokens=prompt_tokens, completion_tokens=num_tokens)
        yield vllm_pb.GenerateResponse(complete=usage)


def test_another_server_is_loaded_in_its_own_protocol(tmp_path: pathlib.Path) -> None:
    """The same figures, by the same names."""
    json_file = tmp_path / "run.json"
    with concurrent.futures.ThreadPoolExecutor() as threads:
        server = grpc.server(threads)
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(VllmEngine(), server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        code, _ = bench(
            *("--protocol", "vllm", "--address", address, "--requests", "3", "--input-tokens", "5"),
            *("--output-tokens", "6", "--json", str(json_file)),
        )
        too_long = bench("--protocol", "vllm", "--address", address)
        server.stop(None).wait()

    seen = result(json_file)
    assert (code, seen["backend"], seen["model_id"]) == (0, "vllm-grpc", "theirs")
    assert (seen["total_input_tokens"], seen["total_output_tokens"], seen["mean_tokens_per_frame"]) == (15, 18, 2.0)
    assert too_long[0] == CANNOT_START
    assert too_long[1].endswith("got up to 256 tokens, want at most the model's 100\n")


def test_a_server_that_dies_ends_the_run_and_leaves_what_was_seen(tmp_path: pathlib.Path) -> None:
    """The run ends by itself, with exit code 1 and a result that says that it is partial and why."""
    json_file = tmp_path / "run.json"
    with scripted_server(100) as (server, address):
        client = bench_process(
            *("--address", address, "--requests", "1000", "--concurrency", "4"),
            *("--input-tokens", "4", "--output-tokens", "10", "--json", str(json_file)),
        )
        with client:
            wait_answered(server, SECOND_WAVE)
            server.kill()
            code = client.wait(30)

    seen = result(json_file)
    assert (code, seen["is_partial"], seen["num_prompts"]) == (FAILED, True, 1000)
    assert seen["stopped"].startswith("the server is gone: ")
    assert seen["completed"] >= 1
    assert seen["failed"] + seen["incomplete"] >= 1
    assert seen["mean_ttft_ms"] > 0


def test_an_interrupted_run_leaves_what_was_seen(tmp_path: pathlib.Path) -> None:
    """Ctrl-C ends the run; figures are those of what had ended, the rest is incomplete, and the exit code is 130."""
    json_file = tmp_path / "run.json"
    with scripted_server(100) as (server, address):
        client = bench_process(
            *("--address", address, "--requests", "1000", "--concurrency", "4"),
            *("--input-tokens", "4", "--output-tokens", "uniform:2:50", "--json", str(json_file)),
        )
        with client:
            wait_answered(server, SECOND_WAVE)
            client.send_signal(signal.SIGINT)
            code = client.wait(30)

    seen = result(json_file)
    assert (code, seen["is_partial"], seen["stopped"]) == (INTERRUPTED, True, "interrupted")
    assert seen["completed"] >= 1
    assert seen["incomplete"] >= 1
    assert seen["failed"] == 0


def test_nobody_to_load_is_said_soon() -> None:
    """One line names the address and the reason; whether the port is closed or takes connections and says nothing.

    Nothing but the command's own timeout ends the wait for a port that says nothing.
    """
    assert ASK_TIMEOUT_S <= 2
    with socket.socket() as closed, socket.socket() as silent:
        closed.bind(("127.0.0.1", 0))
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for listener, reason in ((closed, "UNAVAILABLE"), (silent, "DEADLINE_EXCEEDED")):
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            code, complaint = bench("--address", address)

            assert (code, len(complaint.splitlines())) == (CANNOT_START, 1)
            assert complaint.startswith(f"pathfox: cannot bench {address}: {reason}: ")


def test_lengths_beyond_the_model_are_refused_with_its_limit() -> None:
    """Nothing is sent: the server's own context length is in the message."""
    with scripted_server(1000) as (_, address):
        code, complaint = bench("--address", address, "--input-tokens", "4000", "--output-tokens", "97")

    assert code == CANNOT_START
    assert complaint.endswith("--output-tokens: got up to 4097 tokens, want at most the model's 4096\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rate", "0"], "--rate: got 0, want 0.001 or more"),
        (["--rate", "nan"], "--rate: got nan, want 0.001 or more"),
        (["--rate", "-2"], "--rate: got -2, want 0.001 or more"),
        (["--rate", "1", "--burstiness", "0"], "--burstiness: got 0, want 0.001 or more"),
        (["--ramp-to", "4"], "--ramp-to: got no --rate to begin with, want one"),
        (["--requests", "0"], "--requests: got 0, want 1 .. 100000"),
        (["--concurrency", "0"], "--concurrency: got 0, want 1 .. 100000"),
        (["--duration", "nan"], "--duration: got nan, want 0.001 .. 1e+06"),
        (["--timeout", "-1"], "--timeout: got -1, want 0.001 .. 1e+06"),
        (["--temperature", "nan"], "--temperature: got nan, want 0 .. 100"),
        (["--goodput", "latency:5"], "--goodput: got 'latency:5', want ttft:MS, tpot:MS or e2el:MS, each above 0"),
        (["--profile", "x", "--json", "y"], "--json: got y, want none beside --profile"),
        (["--json", "/no/such/folder/x"], "--json: cannot write /no/such/folder/x: No such file or directory"),
        (["--plot", "/"], "--plot: cannot write /: Is a directory"),
        (["--text", "/no/such/file"], "--text: cannot read /no/such/file: No such file or directory"),
        (["--tokenizer", "/no/such/file"], NO_TOKENIZER),
        (["--protocol", "oip"], NEEDS_TOKENIZER),
        (
            ["--address", "10.0.0.1:1"],
            "--address: 10.0.0.1:1 is not this machine; --allow-remote, if it is yours to load",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused_in_one_line(arguments: list[str], complaint: str) -> None:
    """Before anything is sent: the option, what was given, what would be right."""
    assert bench(*arguments) == (CANNOT_START, f"pathfox: {complaint}\n")


def test_what_is_missing_to_draw_is_said_before_the_load(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)

    code, complaint = bench("--plot", str(tmp_path / "x.png"))

    assert (code, complaint) == (CANNOT_START, "pathfox: --plot: needs matplotlib: pip install matplotlib\n")
