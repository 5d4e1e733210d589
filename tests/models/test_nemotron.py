"""Nemotron-Labs-Diffusion: both uses of one set of weights, by numbers recorded of its published code and by hand."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from structprune import Config, load_model, prune, save_pruned
from structprune.config import ExportSettings
from structprune.errors import UserError
from structprune.evaluation.causal import causal_nats
from structprune.evaluation.nelbo import masked_nelbo
from structprune.generation.generate import Options, generate
from structprune.generation.samplers import generation_settings
from structprune.models.blockwise_structprune import pair_mask
from structprune.models.encode import Batches, encode_noisy
from structprune.models.families import FAMILIES, family_of
from structprune.models.nemotron_structprune import query_scale, yarn_frequencies
from structprune.models.rotary_structprune import rotate
from structprune.models.tokenizer import load_tokenizer
from structprune.runs.evaluate import evaluate
from structprune.runs.evaluation_request import read_windows
from structprune.structured.plan import BlockPlan, Plan
from structprune.structured.surgery import apply_plan
from tests.conftest import MASK_ID, PARITY
from tests.tiny_values import NEMOTRON

RECORDED, ROPE = PARITY / "nemotron-labs", NEMOTRON["rope_parameters"]
CASES = {each.pop("name"): each for each in json.loads((RECORDED / "cases.json").read_text())["generate"]}


@pytest.fixture
def expected() -> dict:
    return load_file(RECORDED / "expected.safetensors")


@pytest.fixture
def model(tiny_model):
    """A random model with blocks of four tokens."""
    return tiny_model("nemotron-labs")


@torch.no_grad()
def causal_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Of a sequence that is read causally: (B, T) -> (B, T, V)."""
    context = model.open_context(ids.shape, ids.device, None, ids.shape[1])
    return model.output_head(model.encode(ids, context=context))


@torch.no_grad()
def test_logits_of_both_uses_are_those_of_the_published_code(expected):
    """Texts are longer than `original_max_position_embeddings`, so that the factor of queries counts."""
    model, ids, noisy = load_model(RECORDED), expected["input_ids"], expected["noisy_ids"]
    full, causal = model(noisy).logits, causal_logits(model, ids)  # (B, T, V) each
    assert ids.shape[1] > ROPE["original_max_position_embeddings"]
    assert torch.allclose(full, expected["bidirectional_logits"], atol=1e-5)
    assert torch.allclose(causal, expected["causal_logits"], atol=1e-5)
    rows = model.layout.rows(noisy, ids)  # (B, 2 T)
    pair = model.output_head(model.encode(rows, context=model.layout.context(model, rows.shape, rows.device)))
    assert torch.allclose(pair, torch.cat((expected["noisy_logits"], expected["clean_logits"]), 1), atol=1e-5)
    assert torch.allclose(expected["clean_logits"], causal, atol=1e-5)
    masked = noisy == model.config.mask_token_id
    hidden = encode_noisy(model, noisy, ids, masked)  # (M, C)
    assert torch.allclose(model.output_head(hidden), expected["noisy_logits"][masked], atol=1e-5)


@pytest.mark.parametrize("weights", [(None, 1.0), (0.3, 1.0), (1.0, 0.0)])
def test_the_loss_is_of_both_uses(expected, weights):
    model, ids, p = load_model(RECORDED), expected["input_ids"], expected["mask_probability"]
    model.config.dlm_loss_weight, model.config.ar_loss_weight = weights
    loss = model(expected["noisy_ids"], labels=ids, mask_probability=p).loss
    diffusion, causal = expected["diffusion_sum"] / ids.numel(), expected["causal_sum"] / ids[:, 1:].numel()
    assert torch.allclose(loss, (weights[0] or 1) * diffusion + weights[1] * causal, rtol=1e-5)


@pytest.mark.parametrize("cache", ["none", "prefix"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_published_sampler(case, cache):
    model, recorded = load_model(RECORDED), load_file(RECORDED / "sampling.safetensors")
    prompt, output = recorded[f"{case}/prompt"], recorded[f"{case}/output"]  # (1, P), (1, P + G)
    settings = generation_settings(model.config, CASES[case])
    assert torch.equal(generate(model, prompt, settings, options=Options(cache=cache)), output)
    assert torch.equal(model.generate(prompt, **CASES[case]), output)


def test_rows_of_a_batch_are_generated_as_alone(model):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 2000, (size,), generator=generator) for size in (3, 8, 10)]
    settings = generation_settings(model.config, {"gen_length": 10, "steps": 5})  # the last block is cut
    alone = [model.generate(prompt[None], gen_length=10, steps=5)[0].tolist() for prompt in prompts]
    for cache in ("none", "prefix"):
        assert [text.tolist() for text in generate(model, prompts, settings, options=Options(cache=cache))] == alone
    pad = torch.nn.functional.pad
    ids = torch.stack([pad(prompt, (10 - len(prompt), 0), value=5) for prompt in prompts])  # (B, P)
    real = torch.stack([pad(torch.ones_like(prompt), (10 - len(prompt), 0)) for prompt in prompts])  # (B, P)
    texts = model.generate(ids, real, gen_length=10, steps=5)  # (B, P + G)
    assert [text[10 - len(prompt) :].tolist() for prompt, text in zip(prompts, texts)] == alone


def test_a_finished_block_is_read_causally_once(model):
    """The prompt runs once; a block's first token needs the one before it, its steps only itself."""
    counts, prompt = [], torch.arange(6)
    settings = generation_settings(model.config, {"gen_length": 8, "steps": 8})
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    generate(model, [prompt], settings, options=Options(cache="prefix"))
    handle.remove()
    assert counts == [6, 4, 4, 4] + [4, 4, 4, 4]


def test_draws_follow_the_seed_and_a_temperature_near_zero_is_greedy(model):
    def draw(seed: int, temperature: float) -> list[int]:
        torch.manual_seed(seed)
        return model.generate(torch.arange(6)[None], gen_length=8, steps=8, temperature=temperature)[0].tolist()

    assert draw(0, 1.0) == draw(0, 1.0) != draw(1, 1.0)
    assert draw(0, 1e-6) == draw(1, 0.0)
    settings = generation_settings(model.config, {"gen_length": 8, "steps": 8, "temperature": 1e-6})
    options = Options(generator=torch.Generator().manual_seed(3))
    assert generate(model, [torch.arange(6)], settings, options=options)[0].tolist() == draw(0, 0.0)


def test_pairs_see_clean_text_causally_by_hand():
    assert pair_mask(torch.arange(4)[None], 2, causal=True)[0, 0].int().tolist() == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],  # noisy, second block: its own and the clean one before
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],  # clean: no token behind it
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]


def test_frequencies_by_hand():
    """Of 1, 0.1, 0.01 and 0.001 (theta 10^4), 1 place apart by a factor of 10 in turns: kept, a half, divided, divided.

    In 20 pi positions a frequency of 1 turns 10 times, so that 10 turns have place 0 and 0.1 turns place 2.
    """
    scaling = {"factor": 4.0, "original_max_position_embeddings": 20 * torch.pi, "beta_fast": 10.0, "beta_slow": 0.1001}
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])  # (D/2,)
    scaled = yarn_frequencies(frequencies, 1e4, scaling)  # (D/2,)
    assert torch.allclose(scaled / frequencies, torch.tensor([1, (1 + 1 / 4) / 2, 1 / 4, 1 / 4]))


def test_queries_grow_with_their_position():
    scale = query_scale(torch.tensor([[0, 15, 16, 40]]), ROPE)  # (1, 1, T, 1)
    logs = [1.0, 1.0, 1 + 0.1 * torch.tensor(2.0).log(), 1 + 0.1 * torch.tensor(3.0).log()]
    assert torch.allclose(scale.flatten(), torch.tensor(logs))
    x, cos, sin = torch.ones(1, 2, 4, 2), torch.ones(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    assert torch.allclose(rotate(x, cos, sin, scale)[0, 1, :, 0], torch.tensor(logs))


@torch.no_grad()
def test_the_first_token_behind_padding_has_no_causal_loss(model):
    """By hand: state 0 gives token 5 half of the probability, state 1 gives all 2048 tokens the same."""
    model.output_head.weight.zero_()[5, 0] = torch.tensor(2047.0).log()
    text = torch.zeros(1, 3, model.config.hidden_size)  # (1, 3, C)
    text[0, 0, 0] = text[0, 1, 1] = 1
    labels, real = torch.tensor([[-100, 5, 9]]), torch.tensor([[0, 1, 1]])
    half, one = (torch.tensor(float(odds)).log() for odds in (2, 2048))
    assert torch.allclose(model.causal_loss(text, labels), (half + one) / 2)
    assert torch.allclose(model.causal_loss(text, labels, real), one)


@torch.no_grad()
def test_padding_on_the_left_leaves_the_training_loss_as_it_is(model):
    ids = torch.randint(0, 2000, (1, 12), generator=torch.Generator().manual_seed(0))  # (1, T)
    noisy = ids.clone()
    noisy[:, [1, 4, 6, 11]] = MASK_ID
    expected = model(noisy, labels=ids, mask_probability=torch.tensor([0.4])).loss
    pads = torch.full((1, 3), 7)
    padded = {"labels": torch.cat((torch.full_like(pads, -100), ids), 1), "mask_probability": torch.tensor([0.4])}
    padded["attention_mask"] = torch.cat((torch.zeros_like(pads), torch.ones_like(ids)), 1)
    assert torch.allclose(model(torch.cat((pads, noisy), 1), **padded).loss, expected, atol=1e-5)


def test_the_size_of_blocks_can_be_given(tiny_checkpoint, tmp_path):
    """Where config.json says none, as of any block diffusion family; what is written says it."""
    source = tiny_checkpoint("nemotron-labs", block_size=None)
    model = load_model(source, block_size=8)
    assert model.layout.size == model.config.block_size == 8 and family_of(model.config).in_blocks
    sized = {family.name for family in FAMILIES if "block_size" in family.config_class().to_dict()}
    assert sized == {family.name for family in FAMILIES if family.in_blocks} > {"nemotron-labs", "sdar", "llada2"}
    assert load_model(save_pruned(model, tmp_path / "out")).layout.size == 8
    with pytest.raises(UserError, match="--block-size 64 .* is not a number of tokens below the model's 64 positions"):
        load_model(source, block_size=64)
    with pytest.raises(UserError, match="config.json has block_size = 4: leave out --block-size 8"):
        load_model(tiny_checkpoint("nemotron-labs", name="said"), block_size=8)


@pytest.mark.parametrize("changes, message", [
    ({"block_size": None}, "no positive integer 'block_size', which nemotron-labs needs: .*--block-size"),
    ({"dlm_paradigm": "autoregressive"}, "dlm_paradigm = 'autoregressive' is not supported"),
    ({"sliding_window": 64}, "sliding_window = 64 is not supported"),
    ({"ar_loss_weight": -1}, "ar_loss_weight = -1 is not a number from 0"),
    ({"rope_parameters": None}, "rope_type = 'default' is not supported \\(needs 'yarn'\\)"),
    ({"rope_parameters": ROPE | {"factor": 0}}, "rope_parameters.factor = 0 is not a number"),
    ({"rope_parameters": ROPE | {"beta_slow": 3.0}}, "beta_slow = 3 is not below beta_fast = 2"),
    ({"rope_parameters": ROPE | {"llama_4_scaling_beta": None}}, "llama_4_scaling_beta = None is not a number"),
    ({"rope_parameters": ROPE | {"factor": 4.0, "mscale": 0.5}}, "mscale = 0.5, mscale_all_dim = 1.0: only an"),
    ({"rope_parameters": ROPE | {"attention_factor": 2.0}}, "attention_factor = 2.0, mscale = 1.0"),
    ({"rope_parameters": ROPE | {"rope_theta": 1.0}}, "rope_parameters.rope_theta = 1 is not above 1"),
    ({"rope_parameters": ROPE | {"truncate": False}}, "truncate = False is not supported"),
])  # fmt: skip
def test_what_is_not_computed_is_refused(tiny_checkpoint, changes, message):
    directory = tiny_checkpoint("nemotron-labs")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=message) as caught:
        load_model(directory)
    assert "\n" not in str(caught.value)


def test_options_that_the_sampler_lacks_are_refused(model):
    with pytest.raises(UserError, match="nemotron-labs's sampler has no option 'cfg_scale'"):
        generation_settings(model.config, {"cfg_scale": 1.0})
    settings = generation_settings(model.config, {"gen_length": 8, "steps": 8, "block_length": 8})
    with pytest.raises(UserError, match="block_length = 8 is not the model's own, 4: leave it out"):
        generate(model, [torch.arange(5)], settings)
    with pytest.raises(UserError, match="holds the mask token"):
        generate(model, [torch.tensor([MASK_ID])], generation_settings(model.config, {"gen_length": 8, "steps": 8}))


def test_what_the_next_token_costs(expected):
    """Windows of two lengths of a batch, in slices of logits or not, cost what the recorded sum says."""
    model, ids = load_model(RECORDED), expected["input_ids"]
    for tokens in (22, 64):
        nats = causal_nats(model, ids, Batches(tokens))  # (N,)
        assert nats.shape == (2,) and torch.allclose(nats.sum() * 21, expected["causal_sum"], rtol=1e-5)
    noise = (expected["noisy_ids"][:, None], expected["mask_probability"][:, None])
    estimate = masked_nelbo(model, ids, *noise)
    assert torch.allclose(estimate.causal, nats, rtol=1e-5)
    assert torch.allclose(estimate.nelbo.sum() * 22, expected["diffusion_sum"], rtol=1e-5)


@pytest.mark.parametrize("fidelity", [False, True])
def test_an_evaluation_reports_both_losses(tiny_checkpoint, text_path, eval_settings, tmp_path, fidelity):
    checkpoints = [tiny_checkpoint("nemotron-labs"), tiny_checkpoint("nemotron-labs", 1, name="other")]
    settings = eval_settings(text_path, evaluation__fidelity=fidelity)
    result = evaluate(list(map(str, checkpoints)), settings, tmp_path / "results").summary["checkpoints"]
    values = [result[name]["text.txt"]["metrics"]["causal_ce"]["value"] for name in ("nemotron-labs-tiny", "other")]
    models = [load_model(each) for each in checkpoints]
    evaluation, tokenizer = settings.evaluation, load_tokenizer(checkpoints[0])
    windows = read_windows(evaluation, str(text_path), evaluation.length, tokenizer)  # (N, T)
    means = [causal_nats(model, windows, Batches(64)).mean().item() for model in models]
    assert values == pytest.approx(means, rel=1e-5) and values[0] != values[1]
    metrics = result["other"]["text.txt"]["metrics"]
    assert 7 < metrics["nelbo"]["value"] < 30 and ("kl" in metrics) == fidelity


@pytest.mark.parametrize("method, title", [
    ("structured", "| next token, nats |"), ("unstructured", "Nats of the next token there: "),
])  # fmt: skip
def test_a_run_reports_both_losses(tiny_checkpoint, text_path, small_run, tmp_path, method, title):
    """Of the dense model and the one that it makes, on the windows that it held out."""
    pairs = [pair for pair in small_run if not pair.startswith("structured.") or method == "structured"]
    config = Config.load(overrides=[*pairs, f"method={method}", f"calibration.source={text_path}"])
    dense = load_model(tiny_checkpoint("nemotron-labs"))
    pruned = prune(dense, config)
    own, windows = pruned.report["held_out_nelbo"]["causal"], pruned.calibration.check.input_ids  # (n, T)
    models = (load_model(dense.source.directory), pruned.model)
    before, after = (causal_nats(model, windows, Batches(64)).mean().item() for model in models)
    assert [own["dense"], own["pruned"]] == pytest.approx([before, after], rel=1e-5) and before != after
    assert own["loss"]["mean"] == pytest.approx(after - before, rel=1e-3)
    pruned.save(tmp_path / "out")
    assert title in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("compat", ["official", "free"])
def test_exports_load_with_the_files_beside_them(tiny_checkpoint, tmp_path, compat):
    """Heads go in the family's own layout too: its code reads `head_dim`."""
    dense = load_model(tiny_checkpoint("nemotron-labs"))
    block = BlockPlan((0, 1, 3, 4), (0, 1), tuple(range(32)))
    first = block if compat == "official" else BlockPlan((2,), (0,), tuple(range(8)))
    model = apply_plan(dense, Plan("nemotron-labs", (first, block, block)))
    directory = save_pruned(model, tmp_path / "out", export=ExportSettings(compat=compat))
    values = json.loads((directory / "config.json").read_text())
    if compat == "official":
        assert values["model_type"] == "nemotron_labs_diffusion" and values["rope_parameters"] == ROPE
        assert values["num_attention_heads"] == 4 and values["intermediate_size"] == 32 and values["head_dim"] == 8
        assert "attn_implementation" not in values
    again = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    ids = torch.arange(40).view(2, 20)  # (B, T)
    assert torch.equal(again.generate(ids, gen_length=8, steps=8), model.generate(ids, gen_length=8, steps=8))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert torch.equal(load_model(directory)(ids).logits, model(ids).logits)
