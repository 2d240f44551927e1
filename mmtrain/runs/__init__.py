"""Tools that start several runs and set their results side by side."""
