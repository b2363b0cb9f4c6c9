"""Chain ids name a prefix and a compute class."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from server.engine.chain import CHAIN_ID_BYTES, ChainIds

TOKENS = np.arange(32, dtype=np.int32)


def ids(chain: ChainIds, tokens: np.ndarray, salt: bytes = b"") -> list[bytes]:
    """Return the ids of all whole pages."""
    made: list[bytes] = []
    chain.extend(made, chain.root(salt), tokens, tokens.size // chain.page_size_tokens)
    return made


def test_extends_by_whole_pages_to_the_same_ids() -> None:
    """Asking for more pages later gives the ids that asking at once gives."""
    chain = ChainIds("f", 4)
    at_once = ids(chain, TOKENS)
    in_parts: list[bytes] = []
    for num_pages in (1, 3, 8):
        chain.extend(in_parts, chain.root(b""), TOKENS, num_pages)

    assert in_parts == at_once
    assert {len(each) for each in at_once} == {CHAIN_ID_BYTES}


def test_fingerprint_salt_and_page_size_change_every_id() -> None:
    """No id is shared by two compute classes, two tenants or two page sizes."""
    made = [
        ids(ChainIds("f", 4), TOKENS),
        ids(ChainIds("g", 4), TOKENS),
        ids(ChainIds("f", 4), TOKENS, b"tenant"),
        ids(ChainIds("f", 8), TOKENS),
    ]

    assert len({each for chain_ids in made for each in chain_ids}) == sum(map(len, made))


@given(place=st.integers(0, 31), token=st.integers(100, 1000))
def test_a_changed_token_changes_its_page_and_all_after(place: int, token: int) -> None:
    """An id depends on every token of the prefix and on none after its page."""
    chain = ChainIds("f", 4)
    other = TOKENS.copy()
    other[place] = token

    pairs = list(zip(ids(chain, TOKENS), ids(chain, other), strict=True))

    assert all((a == b) == (page < place // 4) for page, (a, b) in enumerate(pairs))


def test_does_not_depend_on_the_layout_of_the_array() -> None:
    """Ids are made of token ids, not of how an array holds them."""
    chain = ChainIds("f", 4)
    strided = np.repeat(TOKENS, 2)[::2]

    assert ids(chain, strided) == ids(chain, TOKENS)
