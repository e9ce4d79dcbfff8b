"""Whether SFTMix helps, at a size that two CPU cores afford: see `docs/study.md`."""
