import prelude  # noqa: F401
