"""The same training in Trimtab and in its peers, alternating."""

from trimtab.bench.driver import PEERS, Asked, compare, summary

__all__ = ["PEERS", "Asked", "compare", "summary"]
