"""Parts that all ops share: errors, argument checks, launch shapes, and the question whether Triton can run."""
