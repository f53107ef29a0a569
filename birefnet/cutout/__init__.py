"""`birefnet cutout`: cut-outs of files and folders, with decoding, network and encoding in parallel.

`plan_jobs` assigns an output file to each photo. `cut_out_photos` does the work and reports each photo.
"""

from birefnet.cutout.jobs import Job, Report, plan_jobs
from birefnet.cutout.stages import cut_out_photos


__all__ = ["Job", "Report", "cut_out_photos", "plan_jobs"]
