"""`python -m nanovllm`."""

import sys

from nanovllm.cli import main

if __name__ == "__main__":  # processes that are spawned import this file, too
    sys.exit(main())
