"""Measurements of the inference engine on one GPU, one file a kind; `mmtrain.bench.infer_gpu` runs them."""
