"""A data set of pictures that the project draws itself: shapes, colours, counts, positions and short words.

font and shapes (pixels) -> scene (what is in a picture, and what can be said of it) -> write (files, for the readers of
`mmdata.prepare_images`). `python -m mmdata.draw --output drawn` makes it.
"""
