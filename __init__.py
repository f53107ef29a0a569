"""The files of the Hub repository as a Python package, `birefnet.repository`."""
