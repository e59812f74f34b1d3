"""Training. The story is `loop.fit`; `run` is a run in its directory: what is checked, said, committed and taken up again."""
