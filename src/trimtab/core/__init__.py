"""Foundations of every other folder: errors, files, configuration, processes, and the hook into attention."""
