"""
The files of the Hub repository as a Python package, `birefnet.repository`.

The package itself imports nothing, so that `photo_birefnet` is available without torch.
`birefnet.inference.registration` registers the model with transformers' Auto classes.
"""
