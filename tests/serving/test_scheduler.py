"""The scheduler by itself: which prefill programs it picks."""

import pytest

from mimo_jax.request import SamplingParams
from serve.engine.budget import prefill_sizes
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence
from serve.generation import GenerationRequest
from tests.serving.engines import sizes


def prefills(*lengths: int) -> list[tuple[int, int]]:
    """The programs that prompts of these lengths are computed with, if they come all at once."""
    scheduler = Scheduler(sizes(slots=8, pages=512, prefills=prefill_sizes(512, 8)))
    for i, length in enumerate(lengths):
        request = GenerationRequest(str(i), [i + 1] * length, SamplingParams(1))
        scheduler.add(Sequence(request, 0, request.sampling, i))
    programs, computed = [], 0
    while computed < sum(lengths):
        step = scheduler.plan()
        rows, tokens = step.prefill_size
        assert len(step.prefill) <= rows
        assert all(0 < row.count <= tokens for row in step.prefill)
        computed += sum(row.count for row in step.prefill)
        programs.append(step.prefill_size)
    assert computed == sum(lengths)
    return programs


def test_prefill_sizes():
    assert prefill_sizes(512, 8) == ((1, 64), (4, 64), (1, 128), (1, 512))
    assert prefill_sizes(2048, 2) == ((1, 64), (2, 64), (1, 128), (1, 512), (1, 2048))
    assert prefill_sizes(64, 8) == ((1, 64),)
    assert prefill_sizes(16, 8) == ((1, 16),)


@pytest.mark.parametrize(
    ("lengths", "programs"),
    [
        ((40,), [(1, 64)]),
        ((99,), [(1, 128)]),
        ((300,), [(1, 512)]),
        ((600,), [(1, 512), (1, 128)]),
        ((40, 40, 40), [(4, 64)]),
        ((99,) * 4, [(4, 64)] * 2),
        ((99,) * 8, [(4, 64)] * 4),
        ((300, 40, 40), [(1, 512), (4, 64)]),
        ((300, 300), [(1, 512)] * 2),
    ],
)
def test_a_step_gets_as_far_as_it_can_with_the_smallest_program(lengths, programs):
    assert prefills(*lengths) == programs
