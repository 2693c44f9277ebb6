"""``python -m moesaic`` is the command ``moesaic``."""

import sys

from moesaic.cli.main import main

sys.exit(main())
