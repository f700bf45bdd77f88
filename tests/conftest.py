"""Of all tests: a rule's own mistake fails the test instead of becoming a refusal, Ctrl-C reaches what tests start, and
properties are tried on the same examples by everybody."""

import os
import signal

from hypothesis import settings

os.environ["GRAPHCOMB_STRICT"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell, and then in every child
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Everybody's run tries the same examples, so that a failure is a change's; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
