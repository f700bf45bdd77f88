"""`python -m graphcomb`, which is also how several processes start: `accelerate launch -m graphcomb run RECIPE.yaml`."""

import sys

from .cli import main

sys.exit(main())
