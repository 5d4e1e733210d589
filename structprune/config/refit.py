"""How the weights that remain after pruning are refitted."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from structprune.config.names import Arm
from structprune.config.sections import Section

Weighting = Literal["uniform", "noise", "certainty", "gradient"]


class ReconstructSettings(Section):
    enabled: bool = True
    """Refit the remaining weights. false: only remove."""
    target: Literal["dense", "layer", "mixed"] = "dense"
    """Target outputs. dense: the dense model's. layer: the dense layer's on the pruned model's input to it. mixed:
    between them, at `dense_share`."""
    dense_share: float = Field(0.5, gt=0, lt=1)
    """For target `mixed`: the dense model's share of the target outputs."""
    stream: float = Field(1.0, ge=0, le=1)
    """Share of what the pruned model's residual stream lacks before a layer, against the dense model's, that its output
    is to make up for. 0 where `target` is layer or `mode` bias, and under masks."""
    producers: bool = True
    """Refit q, k, v, gate and up too, to what they give in the dense model. false where `target` is layer or `mode`
    bias, and under masks."""
    head: bool = False
    """Refit the LM head too, so that it predicts from the pruned model's last hidden states what it does from the dense
    model's."""
    arm: Arm = "masked"
    """Activations that the refit reads."""
    visible: float = Field(1.0, gt=0, le=1)
    """Weight of rows at visible tokens, where nothing is predicted; squared in the sums."""
    weighting: Weighting = "uniform"
    """Importance of the fitted rows. noise: 1 / p where a masked token is predicted, as NELBO has it. certainty: the
    dense model's probability of its likeliest token there. gradient: the squared gradient of the loss at every row."""
    relative: bool = True
    """As `structured.relative`, for the rows of the refit."""
    constant: bool = False
    """Append a constant feature, which gives the pruned layer a bias."""
    mode: Literal["least-squares", "bias"] = "least-squares"
    """least-squares: refit the weights. bias: only add the mean output of the removed units (FLAP)."""
    damping: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3), min_length=1
    )
    """Lambdas to choose from per layer, relative to the mean diagonal of the Gram matrix. Infinity, which changes
    nothing, is always among them."""

    @model_validator(mode="before")
    @classmethod
    def _layers_alone(cls, values: Any) -> Any:
        """What compares with the dense model's hidden states is off where a layer is fitted to itself."""
        alone = {"target": "layer", "mode": "bias", "enabled": False}
        if isinstance(values, dict) and any(values.get(key) == value for key, value in alone.items()):
            return {"stream": 0.0, "producers": False} | values
        return values

    @property
    def adds_bias(self) -> bool:
        """Whether pruned layers get a bias."""
        return self.enabled and (self.constant or self.mode == "bias")
