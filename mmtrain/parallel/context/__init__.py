"""Context parallelism: ranks that share packed rows.

A row is cut into equal chunks, and a table says which rank owns which (`ownership`, `row_shard`), so that memory and
the work of the softmax layers are even. Micro-batches are cut on their way into the model (`cut`), after their labels
were counted; both mixers meet the rest of their documents behind the attention call (`context_parallel`).
"""
