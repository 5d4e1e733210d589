"""Generation: equal to the published samplers, and independent of how prompts are batched."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from structprune import load_model
from structprune.errors import UserError
from structprune.generation import denoise
from structprune.generation.generate import Options, generate
from structprune.generation.samplers import DreamGeneration, LLaDAGeneration, generation_settings, low_confidence

MASK = 2047
PROMPTS = [torch.arange(start, start + length) * 7 % 2000 for start, length in ((3, 9), (40, 4), (77, 6), (500, 9))]
FAMILIES = {LLaDAGeneration: "llada", DreamGeneration: "dream"}
FORMS = {  # the samplers' forms: name -> settings
    "low confidence": LLaDAGeneration(12, 6, 6),
    "guided": LLaDAGeneration(12, 6, 6, cfg_scale=0.8),
    "tempered": LLaDAGeneration(12, 6, 6, temperature=0.8),
    "random": LLaDAGeneration(12, 6, 6, remasking="random"),
    "entropy": DreamGeneration(12, 5),
    "margin, top-p": DreamGeneration(12, 5, "topk_margin", top_p=0.8),
    "tempered, top-k": DreamGeneration(12, 5, "maskgit_plus", temperature=0.7, top_k=20),
    "alg_temp": DreamGeneration(12, 5, "maskgit_plus", alg_temp=0.3),
    "origin": DreamGeneration(12, 5, "origin", temperature=0.7, top_p=0.9),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps_of(model, prompts, settings, **options):
    """The recorded steps of a generation, and its output."""
    steps = []
    output = generate(model, prompts, settings, options=Options(record=steps.append, **options))
    return steps, output


def test_tokens_equal_the_published_samplers(parity):
    model, expected = load_model(parity), load_file(parity / "sampling.safetensors")
    cases = json.loads((parity / "cases.json").read_text())["generate"]
    assert len(cases) == {"dream": 5, "sdar": 4}.get(parity.name, 3)
    for case in cases:
        name = case.pop("name")
        if "max_new_tokens" in case:
            case["gen_length"] = case.pop("max_new_tokens")
        mask = expected.get(f"{name}/attention_mask")
        output = generate(
            model, expected[f"{name}/prompt"], generation_settings(model.config, case), mask, options=Options(batch=2)
        )
        assert torch.equal(output, expected[f"{name}/output"]), name


@pytest.mark.parametrize("form", FORMS)
def test_neither_batch_nor_order_nor_padding_changes_tokens(tiny_model, form):
    settings = FORMS[form]
    model = tiny_model(FAMILIES[type(settings)])
    alone = generate(model, PROMPTS, settings, options=Options(generator=seeded(), batch=1))
    together = generate(model, PROMPTS, settings, options=Options(generator=seeded(), batch=4))
    for prompt, one, many in zip(PROMPTS, alone, together, strict=True):
        assert torch.equal(one[: len(prompt)], prompt) and len(one) == len(prompt) + 12
        assert torch.equal(one, many) and MASK not in one
    assert len({tuple(tokens[-12:].tolist()) for tokens in alone}) == 4  # the prompts matter


@pytest.mark.parametrize("form", FORMS)
def test_the_seed_decides_where_chance_has_a_part(tiny_model, form):
    settings = FORMS[form]
    model, state = tiny_model(FAMILIES[type(settings)]), torch.get_rng_state()
    first, again, other = (
        torch.cat(generate(model, PROMPTS, settings, options=Options(generator=seeded(seed), batch=2)))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and torch.equal(first, other) != settings.draws
    assert torch.equal(torch.get_rng_state(), state)
    if not settings.draws:
        assert torch.equal(torch.cat(generate(model, PROMPTS, settings, options=Options(batch=2))), first)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.inference_mode()
def test_padding_is_inert(tiny_model, family):
    """Hidden states of a left-padded prompt are those of the prompt alone."""
    model = tiny_model(family)
    settings = LLaDAGeneration(12, 6, 6) if family == "llada" else DreamGeneration(12, 6)
    step = steps_of(model, PROMPTS, settings)[0][0]
    padded = model.encode(step.ids, step.attention_mask)  # (B, T, C)
    assert not step.attention_mask.all() and step.prompts.tolist() == [0, 3, 2, 1]  # longest first
    for row, prompt in enumerate(step.prompts.tolist()):
        real = step.attention_mask[row]
        assert step.ids[row, real].tolist() == PROMPTS[prompt].tolist() + [MASK] * 12
        assert MASK not in step.ids[row, ~real]  # padding must not look like something to predict
        alone = model.encode(step.ids[row, real][None])[0]
        assert (padded[row, real] - alone).abs().max() < 1e-5


def test_a_tensor_of_prompts_comes_back_padded_as_it_came(tiny_model):
    model, settings = tiny_model(), LLaDAGeneration(8, 4, 8)
    prompts = torch.tensor([[0, 0, 5, 6], [9, 8, 7, 6]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    output = generate(model, prompts, settings, mask)
    listed = generate(model, [prompts[0, 2:], prompts[1]], settings)
    assert output[0, :2].tolist() == [0, 0] and torch.equal(output[0, 2:], listed[0])
    assert torch.equal(output[1], listed[1]) and output.shape == (2, 12)
    assert generate(model, [], settings) == [] and generate(model, prompts[:0], settings).shape == (0, 12)
    for wrong in (mask.flip(1), mask[:, :3]):
        with pytest.raises(ValueError, match="left padding"):
            generate(model, prompts, settings, wrong)
    with pytest.raises(ValueError, match="not padded"):
        generate(model, list(prompts), settings, mask)


def revealed(steps) -> list[list[list[int]]]:
    """Per step and row, which generated positions it revealed (all but the last step)."""
    masks = [step.ids[:, -12:] == MASK for step in steps]  # (B, G) each
    return [[row.nonzero().flatten().tolist() for row in before & ~after] for before, after in pairwise(masks)]


def test_blocks_are_finished_from_left_to_right(tiny_model):
    steps, _ = steps_of(tiny_model(), PROMPTS[:2], LLaDAGeneration(12, 8, 6))
    assert [step.index for step in steps] == list(range(8))
    counts = [2, 2, 1, 1, 2, 2, 1]  # 6 masks in 4 steps, and again
    for index, (rows, count) in enumerate(zip(revealed(steps), counts, strict=True)):
        block = range(0, 6) if index < 4 else range(6, 12)
        assert all(len(row) == count and set(row) <= set(block) for row in rows)


def test_the_most_confident_positions_go_first(tiny_model):
    """One step of each family, from the model's logits at all positions."""
    for family, settings in (("llada", LLaDAGeneration(12, 3, 12)), ("dream", DreamGeneration(12, 3, "maskgit_plus"))):
        model = tiny_model(family)
        steps, _ = steps_of(model, PROMPTS[:1], settings)
        with torch.inference_mode():
            logits = model(steps[0].ids).logits[0]  # (T, V)
        if family == "dream":
            logits = logits.roll(1, dims=0)
        top, token = logits[-12:].softmax(-1).max(-1)  # (G,)
        count = 4 if family == "llada" else 3  # int(12 · 0.333)
        best = top.argsort(descending=True)[:count]
        assert revealed(steps)[0][0] == sorted(best.tolist())
        assert torch.equal(steps[1].ids[0, -12:][best], token[best])


def test_steps_that_reveal_nothing_cost_nothing(tiny_model):
    steps, output = steps_of(tiny_model(), PROMPTS[:2], LLaDAGeneration(12, 40, 6))
    assert [step.index for step in steps] == [*range(6), *range(20, 26)] and MASK not in torch.cat(output)
    steps, output = steps_of(tiny_model("dream"), PROMPTS[:2], DreamGeneration(12, 12))
    assert steps[0].index == 1 and MASK not in torch.cat(output)  # int(12 · 0.999 / 12) = 0 at the first


@pytest.mark.parametrize(
    "settings, rows",
    [
        (LLaDAGeneration(12, 6, 6), 2 * (6 + 4 + 2)),
        (LLaDAGeneration(12, 6, 6, cfg_scale=0.5), 2 * 2 * (6 + 4 + 2)),
        (LLaDAGeneration(12, 6, 6, remasking="random"), 12),  # only what is revealed
        (DreamGeneration(12, 2), 12 + 7),  # int(12 · 0.4995) = 5 go at the first step
        (DreamGeneration(12, 5, "origin"), 12),
    ],
)
def test_the_head_runs_where_it_is_needed(tiny_model, settings, rows):
    model, seen = tiny_model(FAMILIES[type(settings)]), []
    handle = model.output_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    generate(model, PROMPTS[:3], settings, options=Options(generator=seeded()))
    handle.remove()
    assert sum(seen) == 3 * rows


def test_guidance_masks_the_prompt_in_the_same_pass(tiny_model, monkeypatch):
    model, passes = tiny_model(), []
    encode_at = denoise.encode_at

    def noted(model, ids, positions, context):
        passes.append((ids, context.mask))
        return encode_at(model, ids, positions, context=context)

    monkeypatch.setattr(denoise, "encode_at", noted)
    generate(model, PROMPTS[:2], LLaDAGeneration(12, 2, 12, cfg_scale=0.5))
    assert len(passes) == 2
    for ids, mask in passes:
        assert ids.shape == (4, 21) and (ids[2:, :9] == MASK).all() and not (ids[:2, :9] == MASK).any()
        assert torch.equal(ids[2:, 9:], ids[:2, 9:]) and torch.equal(mask[2:], mask[:2])


def test_small_portions_of_logits_change_nothing(tiny_model, monkeypatch):
    assert denoise.portions([3, 0, 2, 5], 4) == [[(0, 3)], [(2, 2)], [(3, 4)], [(3, 1)]]
    assert denoise.portions([1, 2, 1, 6], 4) == [[(0, 1), (1, 2), (2, 1)], [(3, 4)], [(3, 2)]]
    monkeypatch.setattr(denoise, "LOGIT_BYTES", 4 * 2048 * 4)  # 4 positions
    for form in ("guided", "tempered", "tempered, top-k"):
        settings = FORMS[form]
        model, sizes = tiny_model(FAMILIES[type(settings)]), []
        handle = model.output_head.register_forward_pre_hook(
            lambda _, args, sizes=sizes: sizes.append(args[0].shape[0])
        )
        alone = generate(model, PROMPTS, settings, options=Options(generator=seeded(), batch=1))
        together = generate(model, PROMPTS, settings, options=Options(generator=seeded(), batch=4))
        handle.remove()
        assert max(sizes) == 4 and all(torch.equal(one, many) for one, many in zip(alone, together, strict=True))


def test_stop_at_eos_ends_a_row_after_its_block(tiny_model):
    model, prompts, changes = tiny_model(), [PROMPTS[0], PROMPTS[3]], {"temperature": 0.9}
    steps, free = steps_of(model, prompts, LLaDAGeneration(12, 6, 4, **changes), generator=seeded())
    eos = next(token for token in steps[1].ids[0, -12:].tolist() if token != MASK)  # the first step reveals it
    assert eos not in free[0][-8:] and eos not in free[1]  # in the first row's first block only
    settings = LLaDAGeneration(12, 6, 4, stop_at_eos=True, **changes)
    steps, output = steps_of(model, prompts, settings, eos_id=(eos, 1999), generator=seeded())
    assert torch.equal(output[0][:-8], free[0][:-8]) and output[0][-8:].tolist() == [eos] * 8
    assert torch.equal(output[1], free[1])
    assert [step.prompts.tolist() for step in steps] == [[0, 1]] * 2 + [[1]] * 4
    assert (steps[1].ids[0, -8:] == MASK).all()  # the block is finished first
    model.config.eos_token_id = eos
    assert torch.equal(generate(model, prompts, settings, options=Options(generator=seeded()))[0], output[0])
    model.config.eos_token_id = None
    with pytest.raises(UserError, match="eos_token_id"):
        generate(model, prompts, settings)
    with pytest.raises(ValueError, match="stop_at_eos"):
        generate(model, prompts, LLaDAGeneration(12, 6, 4), options=Options(eos_id=5))


def test_a_model_that_predicts_masks_leaves_them(tiny_model):
    """As published: a mask that is predicted stays one, and nothing hangs."""
    for family, settings in (("llada", LLaDAGeneration(12, 6, 6)), ("dream", DreamGeneration(12, 5))):
        model = tiny_model(family)
        with torch.no_grad():
            model.output_head.weight.zero_()
            model.final_norm.weight.zero_()
        model.output_head.register_forward_hook(lambda _, args, out: out.index_fill(1, torch.tensor([MASK]), 1.0))
        assert generate(model, PROMPTS[:1], settings)[0][-12:].tolist() == [MASK] * 12


def test_progress_counts_steps_of_batches(tiny_model):
    seen = []
    options = Options(batch=3, track=lambda x: seen.append(len(x)) or x)
    generate(tiny_model(), PROMPTS, LLaDAGeneration(12, 6, 6), options=options)
    assert seen == [12]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LLaDAGeneration(128, 128, 48), "gen_length = 128 is not a multiple of block_length = 48"),
        (lambda: LLaDAGeneration(128, 30, 32), "steps = 30 cannot be shared by 4 blocks: give 4 or a multiple"),
        (lambda: LLaDAGeneration(steps=0), "steps = 0 cannot be used: give a whole number"),
        (lambda: LLaDAGeneration(steps=True), "steps = True cannot be used: give a whole number"),
        (lambda: LLaDAGeneration(temperature=-1), "temperature = -1 cannot be used"),
        (lambda: LLaDAGeneration(cfg_scale=float("nan")), "cfg_scale = nan cannot be used"),
        (lambda: LLaDAGeneration(remasking="low_confidenc"), r"did you mean 'low_confidence'\?"),
        (lambda: LLaDAGeneration(stop_at_eos=True), "block_length = 128 leaves only one"),
        (lambda: DreamGeneration(alg="entrpy"), r"unknown alg 'entrpy' \(did you mean 'entropy'\?\)"),
        (lambda: DreamGeneration(eps=1.0), "eps = 1.0 is not below 1"),
        (lambda: DreamGeneration(top_p=0.0), "top_p = 0.0 is not a probability"),
        (lambda: DreamGeneration(top_k=0), "top_k = 0 cannot be used: give a whole number"),
        (lambda: DreamGeneration(alg="origin", alg_temp=0.2), "alg_temp = 0.2 has no effect with alg = origin"),
        (lambda: DreamGeneration(alg="origin", top_p=0.9), "have no effect with alg = origin at temperature 0"),
    ],
)
def test_settings_that_cannot_be_meant(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_settings_by_name(tiny_model):
    by_name = {"steps": 4, "gen_length": 8, "block_length": 4}
    assert generation_settings(tiny_model().config, by_name) == LLaDAGeneration(8, 4, 4)
    assert generation_settings(tiny_model("dream").config, {"alg": "origin"}) == DreamGeneration(alg="origin")
    with pytest.raises(UserError, match="dream's sampler has no option 'cfg_scale'"):
        generation_settings(tiny_model("dream").config, {"cfg_scale": 1.5})
    with pytest.raises(UserError, match=r"llada's sampler has no option 'block_len' \(did you mean 'block_length'\?\)"):
        generation_settings(tiny_model().config, {"block_len": 8})


def test_prompts_that_cannot_be_used(tiny_model):
    model, settings = tiny_model(), LLaDAGeneration(12, 6, 6)
    with pytest.raises(UserError, match="DreamGeneration is not for a model of family llada: use LLaDAGeneration"):
        generate(model, PROMPTS, DreamGeneration(12, 5))
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(model, [PROMPTS[0], PROMPTS[0][:0]], settings)
    with pytest.raises(UserError, match=f"prompt 0 holds the mask token {MASK}"):
        generate(model, [torch.tensor([4, MASK])], settings)
    with pytest.raises(UserError, match="prompt 0 has 53 tokens and gen_length = 12 more do not fit the model's 64"):
        generate(model, [torch.arange(53)], settings)
    assert len(generate(model, [torch.arange(52)], settings)[0]) == 64


def test_low_confidence_in_the_terms_of_both_families(tiny_model):
    config, dream = tiny_model().config, tiny_model("dream").config
    assert low_confidence(config, 12, 6) == LLaDAGeneration(12, 6, 12)
    assert low_confidence(config, 12, 6, 4) == LLaDAGeneration(12, 6, 4)
    assert low_confidence(dream, 12, 6) == DreamGeneration(12, 6, alg="maskgit_plus")
    with pytest.raises(UserError, match="no option 'block_length'"):
        low_confidence(dream, 12, 6, 4)
