"""Clips in, the subject out, steady from frame to frame: `birefnet video`, and `birefnet evaluate --video`.

`video_mattes(...)` yields the mattes of a clip one by one, and `cut_out_video(...)` writes a whole clip.
"""

from birefnet.video.stages import cut_out_video, video_mattes


__all__ = ["cut_out_video", "video_mattes"]
