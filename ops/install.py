"""Installs a lock file into this interpreter's environment and shows how far it is. Needs nothing but pip.

Example:
    .venv/bin/python ops/install.py requirements.lock
"""

import pathlib
import re
import subprocess
import sys

BAR_WIDTH = 32
STEP = re.compile(r"^(?:Collecting|Requirement already satisfied:) ([A-Za-z0-9._-]+)")
LARGE = re.compile(r"^\s*Downloading (\S+) \(([0-9.]+ [MG]B)\)")


def main() -> int:
    """Install the lock file named on the command line; return pip's exit code."""
    lock = pathlib.Path(sys.argv[1])
    total = sum(1 for line in lock.read_text().splitlines() if line[:1].isalnum())
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "--no-input",
        "-r",
        str(lock),
    ]
    done = 0
    tail: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:  # noqa: S603 our own words
        for line in pip.stdout or ():
            tail = [*tail[-30:], line]
            if step := STEP.match(line):
                done += 1
                draw(done, total, step.group(1))
            elif large := LARGE.match(line):
                draw(done, total, f"{large.group(1).split('-')[0]} ({large.group(2)})")
            elif line.startswith("Installing collected packages"):
                draw(total, total, "unpacking; this is most of the wait")
    if pip.returncode:
        sys.stderr.write("\n" + "".join(tail))
        return pip.returncode
    draw(total, total, "done")
    sys.stderr.write("\n")
    return 0


def draw(done: int, total: int, what: str) -> None:
    """Redraw the bar on a terminal; print a line now and then elsewhere."""
    filled = BAR_WIDTH * done // max(total, 1)
    line = f"installing [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {done}/{total} {what}"
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K" + line[:110])
        sys.stderr.flush()
    elif what == "done" or done % 25 == 0:
        sys.stderr.write(line + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
