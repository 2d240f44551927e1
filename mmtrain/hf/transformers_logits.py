"""The process that `mmtrain.hf.check` starts: logits of a folder's model, as transformers computes them.

python -m mmtrain.hf.transformers_logits FOLDER OUT TOKEN TOKEN ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mmtrain.checkpoint.safetensors_file import Planned, write_tensors


def main(folder: str, out: str, *tokens: str) -> None:
    """Write the logits [T, V] of a text, float32, into a file of the safetensors format."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).float().eval()
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([[int(token) for token in tokens]])).logits[0].float().contiguous()
    write_tensors(Path(out), [Planned("logits", torch.float32, tuple(logits_TV.shape))], [logits_TV])


if __name__ == "__main__":
    main(*sys.argv[1:])
