"""Images beside text: the grid of tiles that an image is cut into, and its number of tokens."""
