"""Made-up config.json, headers, plans, calibrations and YAML: read, or refused in one short line; nothing else.

300 examples of each, the same in every run; `pytest -m thorough` tries 5,000, drawn anew.
"""

import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from structprune import Config, UserError
from structprune.calibration.batches import Calibration
from structprune.evaluation.settings import EvaluationConfig
from structprune.models.adapter import Adapter
from structprune.models.checkpoint_files import read_config
from structprune.models.headers import read_header
from structprune.models.loading import load_config
from structprune.structured.plan import Plan

pytestmark = [pytest.mark.slow, pytest.mark.thorough]
LARGE = st.sampled_from([2**31, 2**63, 10**20, 10**400, -1])
NUMBERS = st.one_of(st.integers(), st.integers(-2, 70), st.floats(), LARGE)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["4", "llama", "auto", ""]))
VALUES = st.recursive(
    LEAVES, lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=4), parts, max_size=3)
)


def attempt(read, *arguments) -> None:
    """Call it: it returns, or refuses in one short line."""
    try:
        read(*arguments)
    except UserError as error:
        line = str(error)
        assert "\n" not in line.strip() and len(line) < 1000, line
        line.encode()


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request, shared_checkpoint):
    """A tiny checkpoint's directory, for each family."""
    return shared_checkpoint(request.param)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


KEYS = [
    "d_model", "n_heads", "n_kv_heads", "head_dim", "n_layers", "mlp_hidden_size", "vocab_size", "embedding_size",
    "max_sequence_length", "rope_theta", "rms_norm_eps", "mask_token_id", "include_bias", "weight_tying", "block_type",
    "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size",
    "max_position_embeddings", "rope_scaling", "rope_parameters", "tie_word_embeddings", "per_layer_config",
    "model_type", "architectures", "auto_map", "torch_dtype", "dtype", "quantization_config", "id2label", "num_labels",
    "eos_token_id", "pad_token_id", "problem_type", "attn_implementation", "output_attentions", "initializer_range",
]  # fmt: skip


@given(changes=st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=6)), VALUES, max_size=4))
def test_config_json(model, folder, changes):
    """What is accepted can be built, and written as JSON again."""
    values = read_config(model) | changes
    try:
        text = json.dumps(values)
    except (ValueError, UnicodeEncodeError):  # numbers of too many digits
        return
    (folder / "config.json").write_text(text)

    def build(directory: Path) -> None:
        _, family, config, _ = load_config(directory)
        with torch.device("meta"):
            Adapter(family.model_class(config))
        json.dumps(config.to_dict(), ensure_ascii=False).encode()

    attempt(build, folder)


WHOLE = save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})
LENGTH = struct.unpack("<Q", WHOLE[:8])[0]
HEADER, DATA = json.loads(WHOLE[8 : 8 + LENGTH]), WHOLE[8 + LENGTH :]
ENTRY = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), VALUES, max_size=3)


@given(entries=st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), ENTRY, max_size=3), whole=VALUES)
def test_headers(folder, entries, whole):
    changed = {name: {**HEADER.get(name, {}), **entry} for name, entry in entries.items()}
    for header in ({**HEADER, **changed}, whole):
        try:
            text = json.dumps(header).encode()
        except ValueError:
            continue
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + DATA)
        attempt(read_header, folder / "model.safetensors")


@given(place=st.integers(0, len(WHOLE) - 1), count=st.integers(0, len(WHOLE)), flip=st.binary(min_size=1, max_size=9))
def test_damaged_safetensors(folder, place, count, flip):
    content = (WHOLE[:place] + flip + WHOLE[place + len(flip) :])[:count]
    (folder / "model.safetensors").write_bytes(content)
    attempt(read_header, folder / "model.safetensors")


UNITS = ("query_heads", "kv_heads", "channels")
INDICES = st.lists(st.integers(-1, 50), max_size=6)
BLOCK = st.fixed_dictionaries({}, optional=dict.fromkeys(UNITS, VALUES)) | st.fixed_dictionaries(
    dict.fromkeys(UNITS, INDICES)
)
PLAN = st.fixed_dictionaries(
    {},
    optional={
        "format": st.one_of(st.just(1), VALUES), "family": st.one_of(st.just("llada"), VALUES), "notes": VALUES,
        "blocks": st.one_of(VALUES, st.lists(BLOCK, min_size=3, max_size=3)),
    },
)  # fmt: skip


@given(plan=PLAN)
def test_plans(folder, tiny, plan):
    try:
        (folder / "plan.json").write_text(json.dumps(plan))
    except ValueError:
        return
    attempt(lambda path: Plan.load(path).check(tiny), folder / "plan.json")


@pytest.fixture(scope="module")
def tiny(shared_checkpoint):
    _, family, config, _ = load_config(shared_checkpoint("llada"))
    with torch.device("meta"):
        return Adapter(family.model_class(config))


SHAPES = st.lists(st.integers(0, 5), max_size=4)
DTYPES = st.sampled_from([torch.int64, torch.float32, torch.int32, torch.bool])
TENSORS = st.dictionaries(
    st.sampled_from(["input_ids", "noisy_ids", "mask_probability", "x"]), st.tuples(SHAPES, DTYPES, st.integers(-2, 9))
)
METADATA = st.dictionaries(st.sampled_from(["mask_id", "held_out", "schedule", "trajectory"]), st.text(max_size=25))


@given(tensors=TENSORS, metadata=METADATA, fits=st.booleans(), held_out=st.integers(0, 5))
def test_calibrations(folder, tensors, metadata, fits, held_out):
    made = {name: torch.full(shape, value).to(dtype) for name, (shape, dtype, value) in tensors.items()}
    if fits:
        made |= {"input_ids": torch.ones(3, 4).long(), "noisy_ids": torch.ones(3, 2, 4).long()}
    try:
        content = save(made, metadata={name: value for name, value in metadata.items()})
    except Exception:  # what cannot be written cannot be read
        return
    (folder / "a.safetensors").write_bytes(content)
    attempt(Calibration.load, folder / "a.safetensors", held_out, 7)


SECTIONS = [*Config.model_fields, *EvaluationConfig.model_fields, "x"]
NAMES = sorted({key.rpartition(".")[2] for key in (*Config.known_keys(), *EvaluationConfig.known_keys())})
SECTION = VALUES | st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3)
CONFIGURATION = st.dictionaries(st.sampled_from(SECTIONS), SECTION, max_size=3)


@given(values=CONFIGURATION)
def test_configurations(folder, values):
    try:
        (folder / "a.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    except (ValueError, yaml.YAMLError):
        return
    attempt(Config.load, folder / "a.yaml")
    attempt(EvaluationConfig.load, folder / "a.yaml")


@given(text=st.text(alphabet="ab:-[]{}&*!#|>\n '\"0.,?%@`\t~\x00é", max_size=40))
def test_yaml_texts(folder, text):
    (folder / "a.yaml").write_text(text, encoding="utf-8")
    attempt(Config.load, folder / "a.yaml")
    attempt(Config.load, None, [f"structured.ratio={text}", text])
