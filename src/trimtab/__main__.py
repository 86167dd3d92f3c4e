"""`python -m trimtab` is the command `trimtab`."""

import os
import sys

if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:  # what lies there is not to be imported from here on
    del sys.path[0]

from trimtab.cli import main

sys.exit(main())
