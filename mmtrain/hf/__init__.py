"""Models in Hugging Face folders: export to them, and import from them into a model of any layout."""
