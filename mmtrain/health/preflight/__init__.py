"""Pre-flight of a job's nodes, in less than a minute: each is measured alone and with others, and the odd one is named.

``python -m mmtrain.health.preflight node`` runs once on each node, and leaves reports in a folder that all share;
``judge`` reads them, wherever it runs, and prints the nodes that are good. Nothing of it needs all nodes to be well.
"""
