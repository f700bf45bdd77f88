"""Of all tests: a rule's own mistake fails the test instead of becoming a refusal, Ctrl-C reaches what tests start, and
everybody's run is the same: one thread, no GPU, every test from the same seed, properties on the same examples."""

import gc
import os
import signal

import pytest
import torch
from hypothesis import settings

os.environ["GRAPHCOMB_STRICT"] = "1"
if not os.environ.get("GRAPHCOMB_GPU"):  # set by `make test-gpu`, for the tests that need one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell, and then in every child
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Sums taken by several threads round otherwise, also in the processes that tests start.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# Everybody's run tries the same examples, so that a failure is a change's; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_collection_finish(session):
    """What the libraries made at import is never garbage: looking through it again and again took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Networks are drawn from the same seed whatever ran before, in fixtures of modules too."""
    torch.manual_seed(0)
