"""The mixture of experts: router, experts, and the layer made of them."""
