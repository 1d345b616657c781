"""The stages of training, each a module with `Config` and `train(config) -> Result`; loaded when first used."""

from importlib import import_module


def __getattr__(name: str):
    module = f"{__name__}.{name}"
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # the stage exists, and something that it imports does not
            raise
        raise AttributeError(f"module {__name__!r} has no stage {name!r}") from None
