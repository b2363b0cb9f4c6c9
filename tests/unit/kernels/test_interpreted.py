"""Runs the Triton cases in Triton's interpreter, in a process of its own."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch

CASES = pathlib.Path(__file__).parent / "triton"
ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.timeout(300)
def test_triton_kernels_match_their_references() -> None:
    """Without a GPU, every Triton kernel passes its cases in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the cases run on the GPU itself")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]

    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
