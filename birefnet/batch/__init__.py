"""`birefnet batch`: cut-outs of millions of photos, on one machine or on a Ray cluster, resumable block by block.

`sources` lists photos, `manifest` knows what is done, `worker` computes a block, `runners` run workers here or on Ray.
"""

from birefnet.batch.manifest import Ledger, Settings
from birefnet.batch.runners import run_blocks_here, run_blocks_on_ray
from birefnet.batch.sources import Entry, list_entries
from birefnet.batch.worker import BlockWorker, Task


__all__ = [
    "BlockWorker",
    "Entry",
    "Ledger",
    "Settings",
    "Task",
    "list_entries",
    "run_blocks_here",
    "run_blocks_on_ray",
]
