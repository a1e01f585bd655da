"""`python -m pamm_compile`: see `pamm_compile.cli`."""

from __future__ import annotations

import sys

from pamm_compile.cli import main

sys.exit(main())
