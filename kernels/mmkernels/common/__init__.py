"""What all ops share: errors, argument checks, and what they ask of triton."""
