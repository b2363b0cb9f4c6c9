"""A counter-based generator: the random number of a token is a function of (seed, index, position) and of nothing else.

Philox4x32 with 10 rounds. Key = the seed's two halves; counter = (index, 0, position's low half, position's high half).
Works on tensors of any shape and device; numbers of 32 bits live in int64.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 5.3.
"""

from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Encrypt a counter of four 32-bit words under a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def draw(seed: Tensor, index: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a number below 2^62 for each row, as its high and low 31 bits.

    Args:
        seed: `[L]` int64, the bits of the unsigned seed.
        index: `[L]` int64.
        position: `[L]` int64.
    """
    zero = index * 0
    counter = (index & _MASK, zero, position & _MASK, (position >> 32) & _MASK)
    first, second, _, _ = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return first >> 1, second >> 1


def scale(total: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Return floor(total * u) for u = (high * 2^31 + low) / 2^62, exactly; total is below 2^60."""
    total_high, total_low = total >> 31, total & 0x7FFFFFFF
    return total_high * high + ((total_high * low + total_low * high + ((total_low * low) >> 31)) >> 31)


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of a product. It is cut in halves, because int64 would overflow."""
    upper, lower = (word >> 16) * multiplier, (word & 0xFFFF) * multiplier
    carried = upper + (lower >> 16)
    return carried >> 16, ((carried & 0xFFFF) << 16) | (lower & 0xFFFF)
