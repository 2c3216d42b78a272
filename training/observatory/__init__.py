"""The observatory: what a run writes about its experts, and what is made of it.

`recorder.py` writes, `records.py` and `vitals_log.py` read; everything that draws or logs a population's life starts
from there, so that it works on a finished, a running and a crashed run alike.
"""

from living_moe.training.observatory.lives import Life, lives_of
from living_moe.training.observatory.records import Run, read_run
from living_moe.training.observatory.vitals_log import Snapshot

__all__ = ["Life", "Run", "Snapshot", "lives_of", "read_run"]
