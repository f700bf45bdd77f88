"""Of all tests: a rule's own mistake fails the test instead of becoming a refusal, and Ctrl-C reaches what tests start."""

import os
import signal

os.environ["GRAPHCOMB_STRICT"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell, and then in every child
    signal.signal(signal.SIGINT, signal.default_int_handler)
