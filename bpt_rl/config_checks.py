"""What many configurations ask of their numbers."""


def positive(owner: object, *names: str) -> None:
    """Refuses fields of `owner` that are not above 0, NaN included.

    Raises:
      ValueError: If there is one.
    """
    for name in names:
        if not getattr(owner, name) > 0:  # so that NaN fails too
            raise ValueError(f"{name} must be positive; got {getattr(owner, name)}. Choose a number above 0.")


def not_negative(owner: object, *names: str) -> None:
    """Refuses fields of `owner` below 0, and NaN.

    Raises:
      ValueError: If there is one.
    """
    for name in names:
        if not getattr(owner, name) >= 0:
            raise ValueError(f"{name} must not be negative; got {getattr(owner, name)}. Choose 0 or more.")
