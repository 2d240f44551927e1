"""Context parallelism: ranks that share a packed row.

Nothing is here yet, and `parallel.cp` above 1 is refused (`mmtrain/config/parallel.py`). It enters the model by the
attention call (`mmtrain/model/mixers/attention.py`); rows are cut after their labels were counted
(`mmtrain/train/step.py`).
"""
