import ctypes
import resource
import sys

import pytest
import torch

from dlp_lora.training.cpu import kept_memory

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def faults_of_a_step() -> int:
    """How many pages the system hands out while tensors of 96 MB are made; all are freed at the end."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2 << 20) for _ in range(12)]
    assert sum(tensor.nbytes for tensor in held) == 96 << 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not GLIBC, reason="memory is kept through glibc's allocator")
def test_what_a_step_frees_is_there_for_the_next_one_until_it_is_given_back() -> None:
    pages = (96 << 20) // resource.getpagesize()
    with kept_memory() as give_back:
        for _ in range(3):  # until there is room for all of them
            faults_of_a_step()
        assert faults_of_a_step() < 0.1 * pages
        give_back()
        assert faults_of_a_step() > 0.5 * pages
    assert faults_of_a_step() > 0.5 * pages
