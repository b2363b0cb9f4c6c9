"""The sampler on a GPU: the reference's tensor operations, which keep the law there.

A row's maximum is exact, its sort is stable, and its probabilities are summed as integers, so nothing depends on the
shape of the batch or on how a reduction is split; `exp` works on each element alone.
"""

from kernels.sample.reference import sample, score

__all__ = ["sample", "score"]
