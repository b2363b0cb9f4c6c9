"""The process: from a typed request to tokens and back. `messages.py` says where the rooms meet."""
