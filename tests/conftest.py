"""Of all tests: a rule's own mistake fails the test instead of becoming a refusal."""

import os

os.environ["GRAPHCOMB_STRICT"] = "1"
