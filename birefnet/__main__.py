"""`python -m birefnet` is the console command `birefnet`; also what `accelerate launch -m birefnet train` starts."""

import sys

from birefnet.command_line import main


if __name__ == "__main__":
    sys.exit(main())
