"""The fused kernels of torch that softmax attention chooses among, and what cuDNN needs beside: buckets and plans."""
