"""What DeepSpeed's launcher does on one machine, with forks: `ranks.py COUNT SCRIPT ...` runs the script once per rank.

As there, the first rank that fails ends the others, and its exit status is the launcher's.
"""

import os
import runpy
import signal
import socket
import sys

import warm

if __name__ == "__main__":
    count, sys.argv = int(sys.argv[1]), sys.argv[2:]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = {}
    for rank in map(str, range(count)):
        pid = os.fork()
        if not pid:
            warm.draw_seeds()
            os.environ.update(RANK=rank, LOCAL_RANK=rank)
            sys.stdout.reconfigure(line_buffering=True)
            sys.argv.insert(1, f"--local_rank={rank}")
            sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
            break
        ranks[pid] = rank
    else:
        while ranks:
            pid, status = os.wait()
            del ranks[pid]
            if status:
                for other in ranks:
                    os.kill(other, signal.SIGTERM)
                sys.exit(os.waitstatus_to_exitcode(status))
