"""Questions about images, asked of a run's newest checkpoint, and a page of pictures with its answers."""
