"""Compare settings of the fuser over seeds; --help says how."""

import sys

from ablation import command, toy_run

if __name__ == "__main__":
    sys.exit(toy_run.main(sys.argv[2:]) if sys.argv[1:2] == ["toy"] else command.main(sys.argv[1:]))
