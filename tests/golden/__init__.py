"""Golden dumps: every named config and its parameter tree as text, so that a change of either shows as a diff."""
