"""One validated configuration: defaults, files, overrides, and one line for everything that is not one."""

import pytest

from structprune.config import Config
from structprune.errors import UserError
from structprune.runs.resolve import resolve_masking, resolve_structured


def test_defaults():
    config = Config.load()
    assert (config.structured.score, config.structured.arm, config.reconstruct.arm) == ("obs", None, "masked")
    assert (config.sink.alpha, config.sink.kappa, config.sink.mask, config.sink.scale_free) == (5.0, 2.0, "soft", False)
    assert (config.calibration.steps, config.calibration.interval, config.calibration.windows) == (50, 5, 128)
    assert (config.export.compat, config.structured.round_to, config.structured.split) == ("free", "auto", "measured")


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("structured: {ratio: 0.3, score: wanda}\nsink:\n  kappa: 3\n")
    config = Config.load(path, ["structured.ratio=0.7", "structured.split=4", "reconstruct.damping=[0.1, 1]"])
    assert (config.structured.ratio, config.structured.score, config.sink.kappa) == (0.7, "wanda", 3)
    assert config.structured.split == 4 and config.reconstruct.damping == (0.1, 1)
    assert Config.load(path, {"structured.ratio": 0.7}).structured.ratio == 0.7
    assert Config.load(overrides=["model.device=null"]).model.device is None


def test_a_config_survives_its_own_dump():
    config = Config.load(overrides={"structured.split": 3, "reconstruct.target": "layer"})
    assert Config.build(config.model_dump(mode="json")) == config


def test_it_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().structured.ratio = 0.1


WRONG = {
    "structured.ratios=0.3": "unknown config key 'structured.ratios' (did you mean 'ratio'?)",
    "structured.windows=3": "unknown config key 'structured.windows' (did you mean 'split_windows'?)",
    "structure.ratio=0.3": "unknown config section 'structure' (did you mean 'structured'?)",
    "ratio=0.3": "'ratio' names no section: write section.key=value, such as structured.ratio=0.3",
    "structured.ratio": "'structured.ratio' is not key=value",
    "structured.ratio=[": "the value of 'structured.ratio=[' cannot be read as YAML: quote it",
    "structured.ratio=much": "config key structured.ratio = 'much': input should be a valid number",
    "calibration.seed=.nan": "config key calibration.seed = nan: input should be a finite number",
    "sink.kappa=.inf": "config key sink.kappa = inf: input should be a finite number",
    "sink.alpha=0": "config key sink.alpha = 0: input should be greater than 0",
    "reconstruct.damping=[0.1, -1]": "config key reconstruct.damping = -1: input should be greater than or equal to 0",
    "structured.score=obz": "config key structured.score = 'obz': input should be 'magnitude', 'wanda',",
    "structured.arm=noisy": "config key structured.arm = 'noisy': input should be 'clean', 'masked', 'masked+sink' or",
    "calibration.windows=0": "config key calibration.windows = 0: input should be greater than or equal to 1",
    "structured.split=true": "config key structured.split = True: input should be a number, not true or false",
    "calibration.windows=true": "config key calibration.windows = True: input should be a number, not true or false",
    "calibration.seed=-1": "config key calibration.seed = -1: input should be greater than or equal to 0",
    "calibration.seed=1000000000000000000000": (
        "config key calibration.seed = 1000000000000000000000: input should be less"
    ),
    "reconstruct.damping=[]": "config key reconstruct.damping = []: tuple should have at least 1 item",
    "method=wanda": "config key method = 'wanda': input should be 'structured', 'unstructured' or 'nm'",
    "masking.nm=2of4": "config key masking.nm = '2of4': input should be N:M, such as 2:4",
    "masking.nm=4": "config key masking.nm = 4: input should be N:M, such as 2:4",
    "masking.nm=true": "config key masking.nm = True: input should be N:M, such as 2:4",
    "masking.ratio=1": "config key masking.ratio = 1: input should be less than 1",
    "masking.score=wnada": "config key masking.score = 'wnada': input should be 'magnitude', 'wanda', 'sink-wanda',",
    "masking.column_block=0": "config key masking.column_block = 0: input should be greater than or equal to 1",
    "masking.scroe=wanda": "unknown config key 'masking.scroe' (did you mean 'score'?)",
    "structured.depth_slope=1.5": "config key structured.depth_slope = 1.5: input should be less than or equal to 1",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_is_wrong_is_named_in_one_line(override):
    with pytest.raises(UserError) as caught:
        Config.load(overrides=[override])
    assert str(caught.value).startswith(WRONG[override]) and "\n" not in str(caught.value)


IDLE = {
    "structured.damping = 0.1 has no effect without structured.score = obs": [
        "structured.score=wanda",
        "structured.damping=0.1",
    ],
    "structured.rounds = 3 has no effect without structured.score = obs": [
        "structured.score=taylor",
        "structured.rounds=3",
    ],
    "structured.relative = True has no effect": ["structured.score=magnitude", "structured.relative=true"],
    "structured.depth_slope = 0.1 has no effect without structured.allocation = depth": ["structured.depth_slope=0.1"],
    "reconstruct.constant = True has no effect without reconstruct.enabled": [
        "reconstruct.enabled=false",
        "reconstruct.constant=true",
    ],
    "reconstruct.damping = .* has no effect without reconstruct.mode": [
        "reconstruct.mode=bias",
        "reconstruct.damping=[0.1]",
    ],
    "reconstruct.dense_share = 0.3 has no effect without reconstruct.target = mixed": ["reconstruct.dense_share=0.3"],
    "sink.kappa = 1.0 has no effect without an arm with .sink": ["sink.kappa=1", "structured.arm=masked"],
    "sink.alpha = 3.0 has no effect without sink.mask = soft": [
        "sink.mask=hard",
        "sink.alpha=3",
        "structured.arm=masked+sink",
    ],
    "reconstruct.arm = masked.sink has no effect": ["reconstruct.arm=masked+sink", "reconstruct.enabled=false"],
    "sink.mask = hard has no effect": ["sink.mask=hard", "structured.arm=clean"],
}


@pytest.fixture
def resolve(tiny_model):
    """`resolve(overrides)` -> the request of a run on a tiny model whose positions hold the default windows."""
    model = tiny_model(max_sequence_length=2048)

    def make(overrides: list[str]):
        config = Config.load(overrides=overrides)
        return (resolve_structured if config.method == "structured" else resolve_masking)(config, model)

    return make


@pytest.mark.parametrize("message", IDLE)
def test_a_value_without_effect_is_refused(message, resolve):
    with pytest.raises(UserError, match=message):
        resolve(IDLE[message])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["reconstruct.enabled=false"],
        ["reconstruct.target=mixed", "reconstruct.dense_share=0.3", "reconstruct.producers=true"],
        ["structured.score=wanda", "structured.damping=0.01"],  # the default, said aloud
        ["structured.allocation=depth", "structured.depth_slope=0.1"],
        ["sink.kappa=1"],  # scores are weighted by sinks unless told otherwise
        ["sink.kappa=1", "structured.arm=clean", "reconstruct.arm=masked+sink"],
        ["sink.mask=hard", "sink.kappa=1", "structured.arm=clean+sink"],
        ["structured.split=equal", "structured.split_windows=4"],  # of the measured split only, but no contradiction
    ],
)
def test_values_with_an_effect_are_not(overrides, resolve):
    assert resolve(overrides).config == Config.load(overrides=overrides)


MASKS = ["method=unstructured"]
NM = ["method=nm"]
WANDA = [*MASKS, "masking.score=wanda"]
MAGNITUDE = [*MASKS, "masking.score=magnitude"]
NO_TEXT = [*MAGNITUDE, "reconstruct.enabled=false", "calibration.held_out=0"]
IDLE_MASKS = {
    "structured.score = wanda has no effect without method = structured: leave it out, or set that": [
        *MASKS,
        "structured.score=wanda",
    ],
    "structured.split = 3 has no effect without method = structured": [*NM, "structured.split=3"],
    "export.compat = uniform has no effect without method = structured .masks leave the layout as it is": [
        *NM,
        "export.compat=uniform",
    ],
    "export.max_shard_size = 1GB has no effect": [*MASKS, "export.max_shard_size=1GB"],
    "reconstruct.constant = True has no effect without method = structured": [*MASKS, "reconstruct.constant=true"],
    "reconstruct.stream = 0.5 has no effect without method = structured": [*MASKS, "reconstruct.stream=0.5"],
    "reconstruct.target = mixed has no effect on masks: use dense or layer": [*MASKS, "reconstruct.target=mixed"],
    "reconstruct.mode = bias has no effect without method = structured": [*MASKS, "reconstruct.mode=bias"],
    "reconstruct.target = layer has no effect without reconstruct.enabled = true": [
        *MASKS,
        "reconstruct.enabled=false",
        "reconstruct.target=layer",
    ],
    "masking.nm = 4:8 has no effect without method = nm": [*MASKS, "masking.nm='4:8'"],
    "masking.norms = summed has no effect without masking.score = wanda or ria": [*MASKS, "masking.norms=summed"],
    "masking.order = one-shot has no effect without a score that looks at activations": [
        *MAGNITUDE,
        "masking.order=one-shot",
    ],
    "masking.relative = True has no effect without a score that looks at activations": [
        *MAGNITUDE,
        "masking.relative=true",
    ],
    "masking.damping = 0.1 has no effect without masking.score = sparsegpt": [*WANDA, "masking.damping=0.1"],
    "masking.column_block = 64 has no effect without masking.score = sparsegpt": [*WANDA, "masking.column_block=64"],
    "masking.column_block = 64 has no effect without method = unstructured": [*NM, "masking.column_block=64"],
    "masking.owl_spread = 0.1 has no effect without masking.allocation = owl": [
        *MASKS,
        "masking.allocation=depth",
        "masking.owl_spread=0.1",
    ],
    "masking.owl_threshold = 3.0 has no effect without masking.allocation = owl": [*MASKS, "masking.owl_threshold=3"],
    "masking.depth_slope = 0.1 has no effect without masking.allocation = depth": [
        *MASKS,
        "masking.allocation=owl",
        "masking.depth_slope=0.1",
    ],
    "calibration.windows = 8 has no effect without a score, refit or held-out check": [
        *NO_TEXT,
        "calibration.windows=8",
    ],
    "calibration.source = a.txt has no effect": [*NO_TEXT, "calibration.source=a.txt"],
    "sink.kappa = 1.0 has no effect without an arm with .sink": [*MASKS, "sink.kappa=1"],
    "sink.alpha = 3.0 has no effect without sink.mask = soft": [
        *MASKS,
        "masking.score=sink-wanda",
        "sink.mask=hard",
        "sink.alpha=3",
    ],
}


@pytest.mark.parametrize("message", IDLE_MASKS)
def test_a_value_without_effect_on_masks_is_refused(message, resolve):
    with pytest.raises(UserError, match=message):
        resolve(IDLE_MASKS[message])


@pytest.mark.parametrize(
    "overrides",
    [
        MASKS,
        [*NM, "masking.nm='4:8'", "masking.ratio=0.5", "masking.damping=0.1"],
        NO_TEXT,
        [*MAGNITUDE, "reconstruct.enabled=false", "calibration.windows=8"],  # the held-out check reads text
        [*NO_TEXT, "masking.allocation=owl", "calibration.windows=8"],  # and so does owl
        [*WANDA, "masking.norms=summed", "masking.order=one-shot", "masking.relative=true"],
        [*MASKS, "masking.column_block=64", "masking.damping=0"],
        [*WANDA, "masking.allocation=owl", "masking.owl_spread=-0.1", "masking.owl_threshold=3"],
        [*MASKS, "masking.score=sink-sparsegpt", "sink.kappa=1"],
        [*MASKS, "reconstruct.arm=clean+sink", "sink.alpha=3"],
    ],
)
def test_values_with_an_effect_on_masks_are_not(overrides, resolve):
    assert resolve(overrides).config == Config.load(overrides=overrides)


def test_masking_keys_are_of_no_use_to_a_structured_run(resolve):
    with pytest.raises(UserError, match="masking.score = ria has no effect without method = unstructured or nm"):
        resolve(["masking.score=ria"])


def test_the_method_has_no_section(tmp_path):
    (tmp_path / "run.yaml").write_text("method: unstructured\nmasking: {score: wanda}\n")
    assert Config().method == "structured" and Config.load(tmp_path / "run.yaml").method == "unstructured"
    changed = Config.load(tmp_path / "run.yaml", ["method=nm"])
    assert (changed.method, changed.masking.score, changed.masking.nm) == ("nm", "wanda", "2:4")
    assert Config.load(overrides={"method": "nm"}).method == "nm" and Config.known_keys()[0] == "method"
    with pytest.raises(UserError, match="config key method = {'nm': 2}: input should be"):
        Config.load(overrides=["method.nm=2"])


@pytest.mark.parametrize("text", ["4:8", "'4:8'", '"4:8"'])
def test_nm_with_and_without_quotes(text, tmp_path):
    """YAML takes 4:8 for 248 seconds."""
    (tmp_path / "run.yaml").write_text(f"masking:\n  nm: {text}\n")
    assert Config.load(tmp_path / "run.yaml").masking.nm == "4:8"
    assert Config.load(overrides=[f"masking.nm={text}"]).masking.nm == "4:8"
    assert Config.load(overrides={"masking.nm": "16:32"}).masking.nm == "16:32"


@pytest.mark.parametrize(
    "text, message",
    [
        ("structured: [", "cannot be read as YAML"),
        ("- a\n- b\n", "is not a mapping of sections"),
        ("structured: 3\n", "config key structured = 3"),
        ("\x00", "cannot be read as YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        Config.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file():
    with pytest.raises(UserError, match="no config file at 'nowhere.yaml'"):
        Config.load("nowhere.yaml")


def test_a_scalar_section_with_an_override(tmp_path):
    (tmp_path / "run.yaml").write_text("structured: 3\n")
    with pytest.raises(UserError, match="'structured' is not a mapping"):
        Config.load(tmp_path / "run.yaml", ["structured.ratio=0.3"])


def test_known_keys_are_all_of_them():
    keys = Config.known_keys()
    assert "structured.ratio" in keys and "memory.budget_gb" in keys and len(keys) == len(set(keys)) > 40
