"""The commands, one file each: its help, its arguments, and `run`, which has the floors below do the work and prints the result."""
