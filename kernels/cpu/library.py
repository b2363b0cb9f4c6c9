"""The loaded object of C++ ops for this machine."""


def is_available() -> bool:
    """Say whether the C++ ops can run here."""
    return False
