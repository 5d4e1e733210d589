"""The dense model of a run: in memory, or in the files of its checkpoint."""

from structprune.masking.request import MaskRequest
from structprune.models.loading import load_config, load_model, map_model, source_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.structured.request import StructuredRequest
from structprune.workers import Workers


def load_dense(source: str, request: StructuredRequest | MaskRequest, workers: Workers) -> tuple[DiffusionLM, int]:
    """The model where a request says, and the bytes of its weights in their stored dtype.

    The first process downloads what is not here. Masks and official exports also carry the checkpoint's own code over,
    which is not executed.
    """
    resources, settings = request.resources, request.config.model
    pickles, size = settings.allow_pickle, settings.block_size
    carries_code = isinstance(request, MaskRequest) or request.config.export.compat == "official"
    workers.first(lambda: load_config(source, settings.mask_id, True, pickles, carries_code, size))
    if resources.on_disk:
        dtype = resources.dtype or ("auto" if resources.accelerator else None)
        model = map_model(source, dtype, settings.mask_id, carries_code, size)
    else:
        dtype = "auto" if resources.offload and resources.dtype is None else resources.dtype
        model = load_model(source, dtype, resources.home, code=carries_code, **settings.reading)
    return model, model.num_parameters() * source_of(model).dtype.itemsize
