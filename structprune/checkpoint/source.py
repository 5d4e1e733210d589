"""The checkpoint that a model was loaded from."""

from structprune.errors import UserError
from structprune.models.loading import Source
from structprune.models.modeling_structprune import DiffusionLM


def source_of(model: DiffusionLM) -> Source:
    """Where a model was loaded from, and what was stored there.

    Raises:
        UserError: the model was not loaded from a checkpoint.
    """
    source = getattr(model, "source", None)
    if source is None:
        raise UserError("the model has no source checkpoint: load it with structprune.load_model")
    return source
