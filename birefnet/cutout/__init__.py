"""`birefnet cutout`: cut-outs of files and folders, with decoding, network and encoding side by side.

`plan_jobs` decides which photo goes where; `cut_out_photos` does the work and reports photo by photo.
"""

from birefnet.cutout.jobs import Job, Report, plan_jobs
from birefnet.cutout.stages import cut_out_photos


__all__ = ["Job", "Report", "cut_out_photos", "plan_jobs"]
