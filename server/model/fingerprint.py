"""The name of a model's compute class: equal fingerprints give equal bits, and nothing else is promised."""

from hashlib import blake2b

import torch
from torch import Tensor

from kernels.backend import numerics_version
from kernels.placement import RowPlacement
from server.model.memory import LayerMemory, allocate
from server.model.model import Model
from server.model.rows import Rows

NUM_PROBE_TOKENS = 40
NUM_PREFILL_ROWS = 37
"""The rest follows one by one: a probe sees pages close, many rows and single rows."""
UNLAWFUL = "unlawful-"
"""Before the fingerprint of a path on which the bits of a row may depend on its neighbours."""


def fingerprint(model: Model) -> str:
    """Return the fingerprint of a model on this machine. Runs a short probe, so ask once."""
    parts = [
        model.weights_digest.hex(),
        f"{model.backend}:{numerics_version(model.backend)}",
        str(model.spec.page_size_tokens),
        *(f"{field.name}:{field.shape}:{field.dtype}" for fields in model.page_fields for field in fields),
        _probe(model),
    ]
    digest = blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
    return digest if model.is_row_invariant else UNLAWFUL + digest


def _probe(model: Model) -> str:
    """Hash the logits of a fixed sequence: what compiler, library and device make of the same weights shows here."""
    num_tokens = min(NUM_PROBE_TOKENS, model.spec.context_length_tokens)
    token_ids = torch.arange(num_tokens, dtype=torch.int64) * 7919 % model.spec.vocabulary_size
    num_pages = -(-num_tokens // model.spec.page_size_tokens)
    memory = [
        LayerMemory(allocate(pages, num_pages, model.device), allocate(tails, 1, model.device))
        for pages, tails in zip(model.page_fields, model.tail_fields, strict=True)
    ]
    digest = blake2b(digest_size=32)
    num_prefill = min(NUM_PREFILL_ROWS, num_tokens)
    for start, stop in [(0, num_prefill), *((each, each + 1) for each in range(num_prefill, num_tokens))]:
        rows = _rows(token_ids[start:stop].to(torch.int32), start, num_pages, model.device)
        digest.update(_bytes(model.forward(rows, memory)))
    return digest.hexdigest()


def _rows(token_ids: Tensor, start: int, num_pages: int, device: torch.device) -> Rows:
    count = token_ids.shape[0]
    placement = RowPlacement(
        positions=torch.arange(start, start + count, dtype=torch.int32, device=device),
        sequences=torch.zeros(count, dtype=torch.int32, device=device),
        page_table=torch.arange(num_pages, dtype=torch.int32, device=device).unsqueeze(0),
    )
    last = torch.tensor([count - 1], dtype=torch.int32, device=device)
    return Rows(token_ids.to(device), placement, last)


def _bytes(logits: Tensor) -> bytes:
    return logits.float().cpu().contiguous().numpy().tobytes()
