"""mmtrain: pretraining of MiniMax-01-style lightning-hybrid mixture-of-experts models."""

__version__ = "0.1.0"
