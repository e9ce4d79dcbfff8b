"""The study of pretrained models: see `docs/study.md`."""
