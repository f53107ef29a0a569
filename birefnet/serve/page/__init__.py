"""The page at `/`: Gradio's components around a viewer of our own, and the routes that its pictures come from.

`sessions` holds the visitors' photos in memory, `looks` makes pictures of them, `layout` has the components.
"""

from birefnet.serve.page.layout import mount_page


__all__ = ["mount_page"]
