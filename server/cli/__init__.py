"""The `pathfox` command: the composition of a process, and what people see in a terminal."""
