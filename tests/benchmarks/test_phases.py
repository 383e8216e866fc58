"""The benchmark of the kernel's phases: all of them are counted, in a kernel of their own."""

import phases
import pytest
import torch
from phases import PHASES, measure
from sparq_kernels import cpu
from workload import Case, Shape


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("index", ["int4", "full"])
def test_every_phase_is_counted_and_the_kernel_fits_the_call(one_thread, index):
    case = Case("small", Shape(1, 32, 8, 64, 2048, 32, 256, index))
    for call, python, *of_a_head in measure(case, "float32", 5, torch.ones(1000)):
        assert len(of_a_head) == len(PHASES) and min(of_a_head) > 0 and 0 < python < call


def test_the_kernel_that_serves_counts_nothing():
    assert not hasattr(cpu.kernel(), "sparq_take_phases") and hasattr(phases.instrumented(), "sparq_take_phases")
