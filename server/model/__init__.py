"""Models: from files to a network that turns rows into logits. Start reading at `model.py`."""
