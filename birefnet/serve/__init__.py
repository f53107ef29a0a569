"""`birefnet serve`: a web page and HTTP APIs for cut-outs, with one queue for the network behind all of them.

`create_app` builds the ASGI application; `command` runs it, and a Hugging Face Space runs it in the same way.
"""

from birefnet.serve.app import create_app
from birefnet.serve.limits import Limits


__all__ = ["Limits", "create_app"]
