"""A2D against transformers' own decoders with a full mask, and what tied heads, shifts and scaled positions change."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from structprune import load_model, save_pruned
from structprune.checkpoint.export import obstacles
from structprune.checkpoint.masked import save_masked
from structprune.config import Config, ExportSettings
from structprune.errors import UserError
from structprune.evaluation.texts import Texts
from structprune.generation.generate import generate
from structprune.generation.samplers import generation_settings
from structprune.models.families import family_named
from structprune.models.rotary_structprune import rotary_tables, scaled_frequencies
from structprune.models.sampling_structprune import rounded_counts
from structprune.runs.resolve import resolve_structured
from structprune.structured.plan import BlockPlan, Plan
from structprune.structured.surgery import apply_plan

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MODELS = {"a2d-qwen3": "Qwen3", "a2d-llama": "Llama", "a2d-qwen2": "Qwen2"}
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def ids_of(rows: int = 2, length: int = 12) -> torch.Tensor:
    ids = torch.randint(0, 2000, (rows, length), generator=torch.Generator().manual_seed(2))  # (B, T)
    ids[:, 3:7] = 2047
    return ids


def change(directory, **changes) -> None:
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize("family", MODELS)
def test_logits_are_those_of_the_causal_origin_with_a_full_mask(tiny_checkpoint, family):
    """No released code of the family's is needed for this: only attention differs from its origin."""
    directory = tiny_checkpoint(family, tokenizer=False)
    name, values = MODELS[family], json.loads((directory / "config.json").read_text())
    config = getattr(transformers, f"{name}Config")(**{k: v for k, v in values.items() if k != "model_type"})
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    missing, extra = theirs.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    assert not extra and set(missing) <= {HEAD} and config.tie_word_embeddings == (HEAD in missing)
    theirs.tie_weights()
    with torch.no_grad():
        full = torch.zeros(1, 1, 12, 12)  # added to the scores
        expected = theirs(ids_of(), attention_mask=full).logits  # (B, T, V)
        causal = theirs(ids_of()).logits  # (B, T, V)
        logits = load_model(directory)(ids_of()).logits  # (B, T, V)
    assert (logits - expected).abs().max() < 1e-5 < 0.01 < (logits - causal).abs().max()


@pytest.mark.parametrize("parity", MODELS, indirect=True)
def test_padding_is_masked_as_in_the_released_code(parity):
    expected = load_file(parity / "expected.safetensors")
    with torch.no_grad():
        logits = load_model(parity)(expected["calibration_ids"], expected["attention_mask"]).logits  # (N, T, V)
    real = expected["attention_mask"].bool()  # (N, T)
    assert not real.all()
    assert (logits - expected["padded_logits"])[real].abs().max() < 1e-5


@pytest.mark.parametrize("parity", MODELS, indirect=True)
def test_a_shifted_checkpoint_says_so(parity, tmp_path):
    """The released sampler's tokens with its option right_shift_logits, which a checkpoint's config.json can name."""
    shutil.copytree(parity, tmp_path / "shifted")
    change(tmp_path / "shifted", right_shift_logits=True)
    model, expected = load_model(tmp_path / "shifted"), load_file(parity / "sampling.safetensors")
    (case,) = json.loads((parity / "cases.json").read_text())["shifted"]
    name, texts = case.pop("name"), expected
    prompt, output = texts[f"{name}/prompt"], texts[f"{name}/output"]
    assert torch.equal(torch.stack(generate(model, list(prompt), generation_settings(model.config, case))), output)
    assert torch.equal(model.generate(prompt, **case), output)
    plain = load_model(parity)
    assert not torch.equal(plain.generate(prompt, **case), output)
    saved = save_pruned(model, tmp_path / "out")
    values = json.loads((saved / "config.json").read_text())
    assert "AutoModelForMaskedLM" not in values["auto_map"] and load_model(saved).shifted
    assert "AutoModelForMaskedLM" in json.loads((save_pruned(plain, tmp_path / "plain") / "config.json").read_text())[
        "auto_map"
    ]  # fmt: skip


def test_a_head_that_follows_the_embedding_is_one_weight(tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint("a2d-qwen3")
    state = load_file(directory / "model.safetensors")
    assert HEAD not in state
    model = load_model(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.followers == {HEAD: EMBEDDING}
    assert model.num_parameters() == sum(value.numel() for value in state.values())
    save_file(state | {HEAD: state[EMBEDDING].clone()}, directory / "model.safetensors")  # some files hold both
    both = load_model(directory)
    assert both.lm_head.weight is both.model.embed_tokens.weight
    for compat in ("free", "uniform", "official"):
        saved = save_pruned(both, tmp_path / compat, ExportSettings(compat=compat))
        assert HEAD not in load_file(saved / "model.safetensors")
        assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is True
        with torch.no_grad():
            assert torch.equal(load_model(saved)(ids_of()).logits, model(ids_of()).logits)


def test_where_a_file_holds_both_they_change_together(tiny_checkpoint, tmp_path):
    directory = tiny_checkpoint("a2d-qwen3")
    state = load_file(directory / "model.safetensors")
    save_file(state | {HEAD: state[EMBEDDING].clone()}, directory / "model.safetensors")
    model = load_model(directory)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    written = load_file(save_masked(model, tmp_path / "out", changed=[EMBEDDING]) / "model.safetensors")
    assert torch.equal(written[HEAD], 2 * state[EMBEDDING]) and torch.equal(written[HEAD], written[EMBEDDING])
    assert load_model(tmp_path / "out").lm_head.weight.equal(written[HEAD])


def test_a_head_of_its_own_under_a_config_that_ties_is_refused(tiny_checkpoint):
    directory = tiny_checkpoint("a2d-llama")
    change(directory, tie_word_embeddings=True)
    with pytest.raises(UserError, match=f"{HEAD} is not {EMBEDDING}, but config.json says that they are one: set tie"):
        load_model(directory)
    state = load_file(directory / "model.safetensors")
    save_file({name: value for name, value in state.items() if name != HEAD}, directory / "model.safetensors")
    assert load_model(directory).followers
    change(directory, tie_word_embeddings=False)
    with pytest.raises(UserError, match=f"the weights lack {HEAD}, which config.json asks for"):
        load_model(directory)


def test_a_tied_head_trains_and_grows_with_the_embedding(tiny_model):
    model = tiny_model("a2d-qwen3").train()
    before = model.model.embed_tokens.weight.clone()  # (V, C)
    model(ids_of(), labels=ids_of().flip(1)).loss.backward()
    assert [name for name, _ in model.named_parameters() if "embed" in name or "head" in name] == [EMBEDDING]
    assert model.lm_head.weight.grad is model.model.embed_tokens.weight.grad is not None
    model.resize_token_embeddings(2100)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.out_features == 2100
    assert torch.equal(model.lm_head.weight[:2048], before) and model(ids_of()).logits.shape[-1] == 2100


@pytest.mark.parametrize("family, changes, message", [
    ("a2d-qwen3", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type = 'yarn' is not supported .needs 'default' or"),
    ("a2d-llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear' is not supported"),
    ("a2d-llama", {"rope_scaling": SCALING | {"factor": "8"}}, "rope_scaling.factor = '8' is not a number from 1"),
    ("a2d-llama", {"rope_scaling": SCALING | {"low_freq_factor": None}}, "rope_scaling.low_freq_factor = None is not"),
    ("a2d-llama", {"rope_scaling": SCALING | {"low_freq_factor": 4}}, "low_freq_factor = 4 is not below high_freq"),
    ("a2d-llama", {"rope_scaling": [8]}, "rope_scaling = .* is not an object"),
    ("a2d-llama", {"attention_bias": True}, "attention_bias = True is not supported .a2d-llama needs False"),
    ("a2d-qwen3", {"head_dim": None}, "config.json has no positive integer 'head_dim', which a2d-qwen3 needs"),
    ("a2d-qwen2", {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
    ("a2d-qwen2", {"right_shift_logits": "yes"}, "right_shift_logits = 'yes' is not true or false"),
])  # fmt: skip
def test_what_is_not_computed_is_refused(tiny_checkpoint, family, changes, message):
    directory = tiny_checkpoint(family)
    change(directory, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_model(directory)
    assert "\n" not in str(caught.value)


def test_frequencies_are_scaled_by_how_often_they_turn():
    """In 64 positions the four frequencies turn 8, 4, 2 and 0.5 times; low 1, high 4: kept, kept, a mix, divided."""
    frequencies = 2 * torch.pi * torch.tensor([8.0, 4.0, 2.0, 0.5]) / 64  # (D/2,)
    scaled = scaled_frequencies(frequencies, SCALING)  # (D/2,)
    assert torch.allclose(scaled / frequencies, torch.tensor([1, 1, 2 / 3 / 8 + 1 / 3, 1 / 8]))
    plain, changed = (rotary_tables(torch.arange(5)[None], 8, 10000.0, each)[0] for each in (None, SCALING))
    assert not torch.allclose(plain, changed)


def test_both_releases_names_of_scaled_positions_are_read(tiny_checkpoint):
    old, new = tiny_checkpoint("a2d-llama", rope_scaling=SCALING), tiny_checkpoint("a2d-llama", name="new")
    values = json.loads((new / "config.json").read_text())
    rope = {"rope_parameters": SCALING | {"rope_theta": values.pop("rope_theta")}}
    values.pop("rope_scaling")
    (new / "config.json").write_text(json.dumps(values | rope))
    logits = [load_model(each)(ids_of()).logits for each in (old, new)]
    assert torch.equal(*logits)
    assert load_model(new).config.rope_theta == 10000.0 and load_model(new).config.rotary_scaling == SCALING


def test_a_refit_of_a_head_that_follows_the_embedding_is_refused(tiny_model, small_run):
    asked = [*small_run, "structured.ratio=0.3", "reconstruct.head=true"]
    with pytest.raises(UserError, match="reconstruct.head = true is not possible .* follows the embedding"):
        resolve_structured(Config.load(overrides=asked), tiny_model("a2d-qwen3"))
    assert resolve_structured(Config.load(overrides=asked), tiny_model("a2d-llama")).reconstruct.head


def test_heads_can_go_where_the_familys_own_code_reads_their_size(tiny_model):
    """Qwen's code reads head_dim; Llama's configuration refuses widths that are no multiple of the heads."""
    for family, allowed in (("a2d-qwen3", True), ("a2d-qwen2", True), ("a2d-llama", False)):
        model = tiny_model(family)
        heads, kv_heads = ((0, 1, 3), (0, 1, 3)) if family == "a2d-llama" else ((0, 1, 3, 4), (0, 1))
        block = BlockPlan(heads, kv_heads, tuple(range(48)))
        small = apply_plan(model, Plan(family, (block,) * 3))
        assert ("official" not in obstacles(small.config, None)) == allowed
        request = resolve_structured(Config.load(overrides={"structured.ratio": 0.3}), model)
        assert request.reads_head_dim == allowed


def test_prompts_of_llamas_begin_with_bos():
    tokenizer = SimpleNamespace(bos_token="<s>", bos_token_id=7)
    texts = {family: Texts.of(tokenizer, family_named(family).text_edges) for family in MODELS}
    assert {family: (each.start, each.end) for family, each in texts.items()} == {
        "a2d-qwen3": ((), ()), "a2d-llama": ((7,), ()), "a2d-qwen2": ((), ()),
    }  # fmt: skip


def test_counts_of_a_step_are_rounded_to_even():
    """10 masks in 4 steps: 10/4 = 2.5 -> 2, 8/3 -> 3, 5/2 = 2.5 -> 2, and the 3 that are left."""
    counts = [rounded_counts(torch.tensor([10, 0, 3]), 4, step).tolist() for step in range(4)]
    assert counts == [[2, 0, 1], [3, 0, 1], [2, 0, 0], [3, 0, 1]]
