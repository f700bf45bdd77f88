"""`python -m graphcomb` runs the command line, and `accelerate launch -m graphcomb run RECIPE.yaml` in several processes."""

import sys

from .cli import main

sys.exit(main())
