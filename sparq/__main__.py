"""`python -m sparq` is the command `sparq`."""

import sys

from sparq_command import main

sys.exit(main())
