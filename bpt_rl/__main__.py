"""`python -m bpt_rl` is `bpt-rl`."""

import sys

from bpt_rl.cli import main

sys.exit(main())
