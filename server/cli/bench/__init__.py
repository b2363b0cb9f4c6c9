"""`pathfox bench`: load on a server over gRPC, and what came of it. Start reading at `command.py`."""
