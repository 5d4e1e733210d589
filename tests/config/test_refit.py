"""What a refit compares with the dense hidden states: on by default, off or refused where nothing is compared."""

import pytest

from structprune.config import Config, ReconstructSettings
from structprune.errors import UserError
from structprune.runs.resolve import resolve_masking, resolve_structured

ALONE = {"target": "layer", "mode": "bias", "enabled": False}  # a layer fitted to itself, or none


@pytest.mark.parametrize("key", ALONE)
def test_layers_fitted_to_themselves_have_no_dense_targets(key):
    """FLAP's bias, say, is refitted by itself unless more is asked for."""
    settings, other = ReconstructSettings(), ReconstructSettings(**{key: ALONE[key]})
    assert (settings.producers, settings.stream) == (True, 1.0) and (other.producers, other.stream) == (False, 0.0)
    assert (
        ReconstructSettings(**{key: ALONE[key], "stream": 0.5}).stream == 0.5
    )  # what was asked for is there to be refused


@pytest.mark.parametrize("change, value", [("producers", True), ("stream", 0.5), ("head", True)])
@pytest.mark.parametrize(
    "key, need",
    [("target", "target = dense or mixed"), ("mode", "mode = least-squares"), ("enabled", "enabled = true")],
)
def test_they_are_refused_there_when_asked_for(tiny_model, key, need, change, value):
    config = Config.load(overrides={f"reconstruct.{key}": ALONE[key], f"reconstruct.{change}": value})
    with pytest.raises(UserError) as caught:
        resolve_structured(config, tiny_model(max_sequence_length=2048))
    assert str(caught.value).startswith(f"reconstruct.{change} = {value} has no effect without reconstruct.{need}")


@pytest.mark.parametrize("keys", [{"enabled": False}, {"target": "layer"}, {"mode": "bias"}])
def test_they_may_be_switched_off_where_they_are_off(tiny_model, keys):
    off = keys | {"producers": False, "stream": 0}
    config = Config.load(overrides={f"reconstruct.{key}": value for key, value in off.items()})
    assert resolve_structured(config, tiny_model(max_sequence_length=2048)).reconstruct.producers is False


@pytest.mark.parametrize("method", ["unstructured", "nm"])
def test_masks_have_none_of_them(tiny_model, method):
    model = tiny_model(max_sequence_length=2048)
    plain = Config.load(overrides={"method": method})
    assert (plain.reconstruct.producers, plain.reconstruct.stream) == (False, 0.0)
    assert resolve_masking(plain, model).reconstruct == plain.reconstruct
    for key, value in {"producers": True, "stream": 1.0, "head": True}.items():
        with pytest.raises(UserError, match=f"reconstruct.{key} = {value} has no effect without method = structured"):
            resolve_masking(Config.load(overrides={"method": method, f"reconstruct.{key}": value}), model)


def test_masks_take_layer_targets(tiny_model):
    config = Config.load(overrides={"method": "unstructured", "reconstruct.target": "layer"})
    assert resolve_masking(config, tiny_model(max_sequence_length=2048)).reconstruct.stream == 0
