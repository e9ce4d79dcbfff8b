"""Pairs: the partition by confidence, who is mixed with whom, and how a batch lays them out."""
