"""`python -m dit_patch.cli`, the same as `dit-patch`."""

import sys

from . import main

sys.exit(main())
