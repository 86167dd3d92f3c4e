"""What everything stands on: errors, files, configuration, the process, and the hook into attention."""
