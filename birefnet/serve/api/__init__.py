"""The HTTP routes: each module speaks the dialect of one kind of client.

`removebg` (remove.bg), `rembg` (rembg's server), `openai_images` (OpenAI), `batches` (ZIP) and `status`.
"""
