"""Several runs at once, for what one run cannot show."""
