"""The page pool: who holds which page. The tensors behind the page ids are the runner's.

A page is used (held by at least one sequence), cached (closed, held by nobody, found by its chain id) or free.
Changed only on the compute thread. Does not know sequences, requests or what the fields mean.
"""

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class PagePool:
    """Hands out page ids, shares closed pages by chain id, and evicts the least recently used of what nobody holds.

    Args:
        num_pages: size of the pool.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_holders = [0] * num_pages
        self._chain_ids: list[bytes | None] = [None] * num_pages
        self._closed: dict[bytes, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()
        self.num_used = 0

    @property
    def num_cached(self) -> int:
        """Closed pages that nobody holds."""
        return len(self._unheld)

    @property
    def num_free(self) -> int:
        """Pages with nothing in them."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out."""
        return len(self._free) + len(self._unheld)

    def is_held(self, page_id: int) -> bool:
        """Whether some sequence holds the page."""
        return self._num_holders[page_id] > 0

    def chain_id_of(self, page_id: int) -> bytes | None:
        """Return the address of a closed page."""
        return self._chain_ids[page_id]

    def find(self, chain_id: bytes) -> int | None:
        """Return the closed page of that address, without holding it."""
        return self._closed.get(chain_id)

    def allocate(self, count: int) -> list[int]:
        """Hold `count` pages, evicting where none is free. The caller has checked `num_available`."""
        assert count <= self.num_available
        while len(self._free) < count:
            self._evict()
        pages = [self._free.pop() for _ in range(count)]
        for page_id in pages:
            self._num_holders[page_id] = 1
        self.num_used += count
        return pages

    def share(self, page_id: int) -> None:
        """Hold a closed page once more."""
        assert self._chain_ids[page_id] is not None
        if self._num_holders[page_id] == 0:
            del self._unheld[page_id]
            self.num_used += 1
        self._num_holders[page_id] += 1

    def close(self, page_id: int, chain_id: bytes) -> int:
        """Give a full page its address; return the page to hold from now on.

        Where another sequence has closed the same page before, that one is held instead and this one is freed: by the
        prefix law their bytes are equal.
        """
        first = self._closed.get(chain_id)
        if first is not None:
            self.share(first)
            self.release([page_id])
            return first
        assert self._chain_ids[page_id] is None
        self._closed[chain_id] = page_id
        self._chain_ids[page_id] = chain_id
        return page_id

    def release(self, page_ids: Iterable[int], *, keep: bool = True) -> None:
        """Let go of pages of one sequence, in the sequence's order.

        What nobody else holds is cached if it is closed, else freed. The end of a sequence is evicted before its
        beginning, because a page is found only through those before it.

        Args:
            page_ids: pages that the caller holds.
            keep: False = their bytes are not trusted; cache none of them.
        """
        for page_id in reversed(list(page_ids)):
            self._num_holders[page_id] -= 1
            if self._num_holders[page_id]:
                continue
            self.num_used -= 1
            if self._chain_ids[page_id] is not None:
                self._unheld[page_id] = None
                if not keep:
                    self._forget(page_id)
            else:
                self._free.append(page_id)

    def forget_cached(self) -> None:
        """Free every page that nobody holds."""
        while self._unheld:
            self._evict()

    def check(self) -> None:
        """Assert that every page is used, cached or free, and in one place only."""
        assert self.num_used + self.num_cached + self.num_free == self.num_pages
        assert self.num_used == sum(1 for count in self._num_holders if count > 0)
        assert all(self._chain_ids[page_id] == chain_id for chain_id, page_id in self._closed.items())
        assert all(self._num_holders[page_id] == 0 for page_id in (*self._free, *self._unheld))
        assert len(set(self._free) | set(self._unheld)) == self.num_available
        assert all(self._chain_ids[page_id] is None for page_id in self._free)

    def _evict(self) -> None:
        self._forget(next(iter(self._unheld)))

    def _forget(self, page_id: int) -> None:
        del self._unheld[page_id]
        chain_id = self._chain_ids[page_id]
        assert chain_id is not None
        del self._closed[chain_id]
        self._chain_ids[page_id] = None
        self._free.append(page_id)


class PageTable:
    """Which pages the sequence in each slot has: the mirror of `Sequence.page_ids` that the kernels read.

    Args:
        num_slots: how many sequences run at once.
        max_pages: pages of the longest sequence.
        device: where the model reads it.
    """

    def __init__(self, num_slots: int, max_pages: int, device: torch.device) -> None:
        self._host = np.zeros((num_slots, max_pages), dtype=np.int32)
        self._host_tensor = torch.from_numpy(self._host)
        self._device_tensor = self._host_tensor.to(device)  # on the CPU this is the same memory
        self._is_stale = False

    def write(self, slot: int, first: int, page_ids: list[int]) -> None:
        """Set entries `first ...` of a slot."""
        self._host[slot, first : first + len(page_ids)] = page_ids
        self._is_stale = True

    def tensor(self) -> Tensor:
        """Return the table `[num_slots, max_pages]` int32 on the model's device, up to date."""
        if self._is_stale and self._device_tensor is not self._host_tensor:
            self._device_tensor.copy_(self._host_tensor)
        self._is_stale = False
        return self._device_tensor
