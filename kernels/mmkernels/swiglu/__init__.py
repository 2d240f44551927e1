"""SiLU(gate) * up, the activation between an expert's (or a dense layer's) products. See README.md beside this file."""

from mmkernels.swiglu.api import swiglu, swiglu_grad

__all__ = ["swiglu", "swiglu_grad"]
