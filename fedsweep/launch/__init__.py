"""Starting managers and workers. Knows them by their command lines only."""
