"""What a process of `start_forked` in conftest.py does; it sets `arguments`, `environment` and `output`."""

import os
import runpy
import sys
from functools import partial

import torch

from cluda_cli.cli import main
from cluda_cli.distributed import launch

if __name__ == "__main__":
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(output.fileno(), number)  # noqa: F821
        setattr(sys, name, open(number, "w", encoding="utf-8", buffering=1, closefd=False))  # noqa: SIM115
    output.close()  # noqa: F821
    os.environ.update(environment)  # noqa: F821
    torch.set_num_threads(1)
    launch.start_processes = partial(launch.start_processes, start_method="fork")  # ranks need no imports either
    sys.argv = arguments  # noqa: F821
    main() if arguments[0] == "cluda" else runpy.run_path(arguments[0], run_name="__main__")  # noqa: F821
