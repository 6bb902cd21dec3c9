"""`python -m mnv2_fused`."""

import sys

from mnv2_fused.cli import main

sys.exit(main())
