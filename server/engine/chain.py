"""Chain ids: the addresses of pages. Whoever knows the tokens knows the address.

A page's id is BLAKE2b over the fingerprint, the previous page's id and the page's token ids, so it names the whole
prefix and the compute class that its bytes came from. The first page's previous id is made from the tenant's salt.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]
"""Token ids, `[T]` int32."""

CHAIN_ID_BYTES = 32


class ChainIds:
    """Computes chain ids of one compute class and page size.

    Args:
        fingerprint: names the compute class.
        page_size_tokens: tokens of a page.
    """

    def __init__(self, fingerprint: str, page_size_tokens: int) -> None:
        self.page_size_tokens = page_size_tokens
        name = hashlib.blake2b(fingerprint.encode(), digest_size=CHAIN_ID_BYTES).digest()
        self._base = hashlib.blake2b(name, digest_size=CHAIN_ID_BYTES)

    def root(self, cache_salt: bytes) -> bytes:
        """Return what stands for the previous id of a first page."""
        return hashlib.blake2b(cache_salt, digest_size=CHAIN_ID_BYTES, person=b"pathfox-root").digest()

    def next(self, previous: bytes, token_ids: TokenArray) -> bytes:
        """Return the id of the page that holds these tokens and follows `previous`."""
        state = self._base.copy()
        state.update(previous)
        state.update(token_ids.astype("<i4", copy=False).tobytes())
        return state.digest()

    def extend(self, chain_ids: list[bytes], root: bytes, token_ids: TokenArray, num_pages: int) -> None:
        """Append ids of whole pages of `token_ids` until there are `num_pages` of them."""
        size = self.page_size_tokens
        while len(chain_ids) < num_pages:
            start = len(chain_ids) * size
            previous = chain_ids[-1] if chain_ids else root
            chain_ids.append(self.next(previous, token_ids[start : start + size]))
