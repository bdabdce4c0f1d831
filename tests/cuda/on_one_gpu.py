"""main.py on the first GPU in all processes, which talk to each other by gloo: nccl refuses to share a GPU."""

import functools
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["ACCELERATE_TORCH_DEVICE"] = "cuda:0"

from experiment import runtime  # noqa: E402

runtime.InitProcessGroupKwargs = functools.partial(runtime.InitProcessGroupKwargs, backend="gloo")
runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
