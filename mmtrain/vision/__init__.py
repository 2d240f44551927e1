"""Eyes for the language model: images to embeddings in the places that a row keeps for them (MiniMax-VL-01)."""
