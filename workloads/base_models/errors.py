"""Why a base model cannot be had."""


class BaseModelError(Exception):
    """A base model cannot be used; the message says what to do about it."""


class BaseModelUnavailable(BaseModelError):
    """The place that a base model comes from cannot be reached, or refuses it."""


class BaseModelInvalid(BaseModelError):
    """A name or a folder that cannot be a base model."""
