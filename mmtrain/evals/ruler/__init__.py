"""Tasks of long text that are made, not downloaded: RULER's, the paper's needle, and needles over many rounds."""
