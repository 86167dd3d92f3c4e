"""Proof: the certificate of a run, and the doctor of an installation."""
