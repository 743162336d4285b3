"""`python -m dtmsearch`: the command where its script is not on the path, as in a job on a cluster."""

import sys

from dtmsearch.cli import main

if __name__ == "__main__":
    sys.exit(main())
