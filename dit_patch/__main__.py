"""`python -m dit_patch`, the same as `dit-patch`."""

import sys

from .cli import main

sys.exit(main())
