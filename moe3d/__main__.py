"""``python -m moe3d``."""

import sys

from moe3d.cli import main

sys.exit(main())
