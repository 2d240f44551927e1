"""Parts of the inference engine: what is asked of it, its memory, its schedule, its passes, and sampling."""
