"""`python -m server`, and the `pathfox` command."""

from server.cli.app import app


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
