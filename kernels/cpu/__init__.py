"""The C++ ops behind the CPU backend: their sources, their build, and one thin face per op.

Knows tensors and addresses; knows nothing of models or requests.
"""

NUMERICS_VERSION = 1
"""Part of every fingerprint. Raise it by hand with any change of these sources that may change one bit of a result."""
