"""Asks a question and prints the answer as it comes: `python stream.py "Name three rivers." 127.0.0.1:50051`."""

# ruff: noqa: INP001 (a script, not a package)
import sys

from pathfox.client import Client, Delta, Finished, PathfoxError


def main(question: str = "What is the capital of France?", address: str = "127.0.0.1:50051") -> int:
    """Stream one answer to standard output, and what it cost to standard error."""
    with Client(address) as client:
        try:
            for event in client.generate(messages=[("user", question)], max_tokens=200, timeout_s=120):
                match event:
                    case Delta(text=text):
                        sys.stdout.write(text)
                        sys.stdout.flush()
                    case Finished(reason=reason, usage=usage):
                        sys.stderr.write(f"\n[{reason}, {usage.completion_tokens} tokens]\n")
        except PathfoxError as error:
            sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
