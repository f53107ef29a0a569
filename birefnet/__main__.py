"""`python -m birefnet` runs the console command `birefnet`. `accelerate launch -m birefnet train` uses it as well."""

import sys

from birefnet.command_line import main


if __name__ == "__main__":
    sys.exit(main())
