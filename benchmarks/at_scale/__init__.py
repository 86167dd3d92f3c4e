"""Training on several devices, on paper and on a CPU: costs, shares of a step, tables, and measurements (see benchmarks/scale.py)."""
