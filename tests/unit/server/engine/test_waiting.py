"""The waiting queue."""

import numpy as np

from server.engine.sequence import Seniority, Sequence, Submission
from server.engine.waiting import WaitingQueue
from server.messages import GenerateRequest, SamplingParams


def sequence(serial: int, *, step: int = 0, criticality: int = 2, n: int = 1) -> Sequence:
    """Make the first sequence of a request, its others following."""
    request = GenerateRequest("r", (1, 2, 3), SamplingParams(seed=0, max_tokens=4, n=n))
    submission = Submission(request, serial, np.array([1, 2, 3], dtype=np.int32), submitted_s=0.0)
    made = [
        Sequence(submission, i, seniority=Seniority(step, criticality, serial, i), max_sequence_tokens=100)
        for i in range(n)
    ]
    submission.followers = made[1:]
    return made[0]


def test_arrival_counts_before_criticality_before_serial_number() -> None:
    """Criticality decides only among those that came in the same step."""
    queue = WaitingQueue()
    late = sequence(4, step=1, criticality=1)
    batch, first, second = sequence(1, criticality=3), sequence(2), sequence(3)
    for each in (late, batch, second, first):
        queue.add(each)

    assert list(queue) == [first, second, batch, late]
    assert queue.eldest is first


def test_knows_its_backlog_whatever_leaves_in_between() -> None:
    """The tokens that an entry added are those that it takes away, also if its followers have gone meanwhile."""
    queue = WaitingQueue()
    leader, other = sequence(1, n=3), sequence(2)
    queue.add(leader)
    queue.add(other)
    assert queue.backlog_tokens == 3 * 7 + 7

    leader.submission.followers.clear()
    queue.remove(leader)
    queue.remove(leader)

    assert queue.backlog_tokens == 7
    assert len(queue) == 1
