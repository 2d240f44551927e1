"""From text to a corpus folder: `pipeline.prepare` is the whole of it, the other files its steps."""
