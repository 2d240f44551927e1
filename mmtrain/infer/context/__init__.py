"""Context parallel inference: the keys of every document are spread over ranks, and long prompts are read by all."""
