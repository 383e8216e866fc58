"""`python -m sparq` is the command `sparq`."""

import sys

from sparq.cli import main

sys.exit(main())
