"""``python -m recurra`` is the ``recurra`` command."""

import sys

from recurra.cli import main

sys.exit(main())
